"""Defines ``Rollout``, what a trainer has of one sample, and groups several for a request."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Union

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
    """Holds one prompt and one completion of it, as a trainer has them.

    Attributes:
        prompt: ids ``(P,)``, taken verbatim; or text or a chat, which the server tokenises.
        completion: ids ``(T,)`` as the policy sampled them, EOS included and no padding; or text.
        mask: ``(T,)`` of 0 and 1: the tokens that the policy sampled, without the output of tools; ``None`` = all.
        group: whose rewards it is compared with (GRPO's group); ``None`` = those with the same prompt.
        problem: why it is unscorable, where the trainer's side knows that already: it is not sent; "" = nothing is known against it.
    """

    prompt: Prompt
    completion: Union[TokenIds, str]
    mask: Union[ArrayLike, None] = None
    group: Union[Hashable, None] = None
    problem: str = ""

    @classmethod
    def split(cls, prompt: str, query: str) -> Rollout:
        """Makes a rollout of text, for a trainer that has prompt and completion joined in ``query``.

        Unscorable if ``query`` does not begin with ``prompt``: where the completion begins would be a guess.
        """
        if query.startswith(prompt):
            return cls(prompt, query[len(prompt) :])
        return cls(prompt, query, problem="the text does not begin with its prompt, so that nobody knows where the completion does")

    @classmethod
    def joined(cls, ids: ArrayLike, completion_length: int, mask: Union[ArrayLike, None] = None) -> Rollout:
        """Makes a rollout of ids, for a trainer that has those of prompt and completion in one row.

        Args:
            ids: ``(P + T,)``, without padding.
            completion_length: ``T``; 0 for a completion without a token, which is unscorable.
            mask: ``(T,)``, as for a rollout.

        Raises:
            ValueError: there are fewer ids than that.
        """
        row = as_ids(ids, "ids")
        if not 0 <= completion_length <= len(row):
            raise ValueError(f"completion_length: {completion_length} is not in [0, {len(row)}], the number of ids")
        # never counted from the end: a completion of no tokens would be all of them
        prompt, completion = np.split(row, [len(row) - completion_length])
        return cls(prompt, completion, mask)

    def checked(self, named: str) -> Rollout:
        """Returns the same rollout with arrays of numpy, and a group that compares by value.

        Args:
            named: how its parts are called in errors, with ``{}`` for the part: ``"rollouts[3].{}"``.

        Raises:
            InvalidRequestError: prompt, completion, mask or group is not what it should be; names it.
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
    def prompt_key(self) -> Hashable:
        """Returns a key that is equal for the same prompt."""
        return self.prompt if isinstance(self.prompt, (str, Text, Chat)) else as_ids(self.prompt, "prompt").tobytes()

    @property
    def group_key(self) -> Hashable:
        """Returns a key that is equal within a group."""
        return self.prompt_key if self.group is None else ("group", self.group)

    def masked(self, mask: Mask, signal: str) -> NDArray[np.bool_] | None:
        """Returns the mask ``(T,)`` to send for signals that have ``mask``; ``None`` means every token.

        Raises:
            SignalError: a mask function does not go with text, or gives something else than ``(T,)`` of 0 and 1.
            InvalidRequestError: the rollout's own mask is something else.
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
    """Returns each mask that some signal has, with the name of one that has it."""
    found: dict[Mask, str] = {}
    for signal in signals:
        found.setdefault(signal.mask, signal.name)  # type: ignore[arg-type] # parsed when the signal was made
    return found


@dataclass(frozen=True)
class GroupedRollouts:
    """Holds rollouts as groups to score: those with one prompt together, a completion once for each distinct mask.

    A completion that is sent several times is computed once by the server.

    Attributes:
        groups: what to send.
        sent: for each completion of each group, the index of its rollout and of its mask.
    """

    groups: list[RolloutGroup]
    sent: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], indices: Sequence[int], masks: dict[Mask, str]) -> GroupedRollouts:
        """Groups some of the rollouts of a batch, those at ``indices``."""
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
