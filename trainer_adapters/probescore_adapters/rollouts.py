"""Defines ``Rollout``, a trainer's view of one sample, and arranges several rollouts into groups for one request."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Union

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probescore import Chat, Completion, RolloutGroup, Text
from probescore.types import TokenIds
from probescore_adapters.arrays import as_group_key, as_ids, as_mask
from probescore_adapters.errors import SignalError
from probescore_adapters.signals import MaskFunction, MaskKind, ProbeSignal

Prompt = Union[TokenIds, str, Text, Chat]
Mask = Union[MaskKind, MaskFunction]


@dataclass(frozen=True, eq=False)
class Rollout:
    """A prompt and one completion of the prompt, as a trainer has them.

    Attributes:
        prompt: token ids ``(P,)``, used unchanged; or text or a chat, which the server tokenises.
        completion: token ids ``(T,)`` as the policy sampled them, EOS included and without padding; or text.
        mask: ``(T,)`` of 0 and 1, 1 = the policy sampled the token, 0 = the token comes from a tool; ``None`` = the policy sampled all
            tokens.
        group: key of the rollouts whose rewards are compared with each other (GRPO's group); ``None`` = the rollouts with the same prompt.
        problem: reason why the rollout cannot be scored, if the trainer's side already knows one; the rollout is then not sent. "" = no
            reason is known.
    """

    prompt: Prompt
    completion: Union[TokenIds, str]
    mask: Union[ArrayLike, None] = None
    group: Union[Hashable, None] = None
    problem: str = ""
    name: str = ""
    logprob: Union[float, None] = None
    columns: Union[Mapping[str, Any], None] = None

    @classmethod
    def split(cls, prompt: str, query: str) -> Rollout:
        """Makes a rollout of text, for a trainer that has prompt and completion joined in ``query``.

        The rollout is marked as one that cannot be scored if ``query`` does not begin with ``prompt``, since the place where the completion
        begins would be a guess.
        """
        if query.startswith(prompt):
            return cls(prompt, query[len(prompt) :])
        return cls(prompt, query, problem="the text does not begin with its prompt, so that nobody knows where the completion does")

    @classmethod
    def joined(cls, ids: ArrayLike, completion_length: int, mask: Union[ArrayLike, None] = None) -> Rollout:
        """Makes a rollout of token ids, for a trainer that has the ids of prompt and completion in one row.

        Args:
            ids: token ids ``(P + T,)``, without padding.
            completion_length: ``T``, the number of the completion's tokens; a completion without tokens (0) cannot be scored.
            mask: ``(T,)`` of 0 and 1, 1 = the policy sampled the token.

        Raises:
            ValueError: there are fewer ids than ``completion_length``.
        """
        row = as_ids(ids, "ids")
        if not 0 <= completion_length <= len(row):
            raise ValueError(f"completion_length: {completion_length} is not in [0, {len(row)}], the number of ids")
        # never counted from the end: a completion of no tokens would be all of them
        prompt, completion = np.split(row, [len(row) - completion_length])
        return cls(prompt, completion, mask)

    def checked(self, named: str) -> Rollout:
        """Returns the rollout with its token ids and mask as numpy arrays, and with a group key that can be compared by value.

        Args:
            named: template for the names of the rollout's fields in error messages, with ``{}`` in place of the field:
                ``"rollouts[3].{}"``.

        Raises:
            InvalidRequestError: prompt, completion, mask or group is invalid; the error names the field.
        """
        prompt = self.prompt if isinstance(self.prompt, (str, Text, Chat)) else as_ids(self.prompt, named.format("prompt"))
        completion = self.completion if isinstance(self.completion, str) else as_ids(self.completion, named.format("completion"))
        length = None if isinstance(completion, str) else len(completion)
        return replace(
            self,
            prompt=prompt,
            completion=completion,
            mask=None if self.mask is None else as_mask(self.mask, length, named.format("mask")),
            group=as_group_key(self.group, named.format("group")),
        )

    @property
    def known_tokens(self) -> int:
        """Returns the number of a rollout's token ids; text, whose number of tokens only the server knows, counts 0."""
        return sum(0 if isinstance(part, (str, Text, Chat)) else len(part) for part in (self.prompt, self.completion))

    @property
    def prompt_key(self) -> Hashable:
        """Returns a hashable key that is equal for rollouts with the same prompt."""
        return self.prompt if isinstance(self.prompt, (str, Text, Chat)) else as_ids(self.prompt, "prompt").tobytes()

    @property
    def group_key(self) -> Hashable:
        """Returns a hashable key that is equal for rollouts of the same group, whose rewards are compared with each other."""
        return self.prompt_key if self.group is None else ("group", self.group)

    def masked(self, mask: Mask, signal: str) -> NDArray[np.bool_] | None:
        """Returns the mask ``(T,)`` to send for signals (rules from probe scores to rewards) whose field ``mask`` has the given value;
        ``None`` means that every token counts.

        Raises:
            SignalError: a mask function is used with a completion given as text, or does not return ``(T,)`` of 0 and 1.
            InvalidRequestError: the rollout's own mask is not ``(T,)`` of 0 and 1.
        """
        length = None if isinstance(self.completion, str) else len(self.completion)
        given = None if self.mask is None else as_mask(self.mask, length, "mask")
        if mask is MaskKind.ALL:
            return None
        if not callable(mask) or isinstance(mask, MaskKind):
            return given
        if isinstance(self.completion, str):
            raise SignalError("mask", "a function of completion_ids needs ids, and this rollout is text", signal)
        ids = as_ids(self.completion, "completion")
        try:
            counted = as_mask(mask(ids), len(ids), "what the function gave")
        except ValueError as error:
            raise SignalError("mask", str(error), signal) from None
        return counted if given is None else counted & given


def distinct_masks(signals: Sequence[ProbeSignal]) -> dict[Mask, str]:
    """Returns each distinct value of the field ``mask`` (the tokens that count) of some signals (rules from probe scores to rewards), with
    the name of one signal that uses the value.
    """
    found: dict[Mask, str] = {}
    for signal in signals:
        found.setdefault(signal.mask, signal.name)  # type: ignore[arg-type] # parsed when the signal was made
    return found


@dataclass(frozen=True)
class GroupedRollouts:
    """Rollouts arranged into groups to score: rollouts with the same prompt form a group, in which a completion occurs once for each
    distinct mask.

    The server computes a completion once, also if the completion is sent several times.

    Attributes:
        groups: the rollout groups to send.
        sent: for each completion of each group, the index of the rollout and the index of the mask.
    """

    groups: list[RolloutGroup]
    sent: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], indices: Sequence[int], masks: dict[Mask, str]) -> GroupedRollouts:
        """Arranges the rollouts of a batch at the given ``indices`` into groups of rollouts with the same prompt."""
        members: dict[Hashable, list[int]] = {}
        for index in indices:
            members.setdefault(rollouts[index].prompt_key, []).append(index)
        groups, sent = [], []
        for group in members.values():
            places = [(index, number) for index in group for number in range(len(masks))]
            names = list(masks.items())
            completions = [Completion(rollouts[index].completion, rollouts[index].masked(*names[number])) for index, number in places]
            groups.append(RolloutGroup(rollouts[group[0]].prompt, completions))
            sent.append(places)
        return cls(groups, sent)
