"""``Rollout``: what a trainer has of one sample, and how several become a request."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Union

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probescore import Chat, Completion, RolloutGroup, Text
from probescore.types import TokenIds
from probescore_adapters.errors import SignalError
from probescore_adapters.signals import MaskFunction, MaskKind, ProbeSignal

Prompt = Union[TokenIds, str, Text, Chat]
Mask = Union[MaskKind, MaskFunction]


@dataclass(frozen=True, eq=False)
class Rollout:
    """One prompt and one completion of it.

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
        """One of text, from a trainer that has prompt and completion joined in ``query``.

        Unscorable if ``query`` does not begin with ``prompt``: where the completion begins would be a guess.
        """
        if query.startswith(prompt):
            return cls(prompt, query[len(prompt) :])
        return cls(prompt, query, problem="the text does not begin with its prompt, so that nobody knows where the completion does")

    @property
    def prompt_key(self) -> Hashable:
        """Equal for the same prompt."""
        return self.prompt if isinstance(self.prompt, (str, Text, Chat)) else np.asarray(self.prompt, np.int64).tobytes()

    @property
    def group_key(self) -> Hashable:
        """Equal within a group."""
        return self.prompt_key if self.group is None else ("group", self.group)

    def masked(self, mask: Mask, signal: str) -> NDArray[np.bool_] | None:
        """The mask to send for signals with this one; ``None`` = every token.

        Raises:
            SignalError: a mask function does not go with text, or gives another shape than ``(T,)``.
        """
        given = None if self.mask is None else np.asarray(self.mask).astype(bool)
        if mask is MaskKind.ALL:
            return None
        if not callable(mask) or isinstance(mask, MaskKind):
            return given
        if isinstance(self.completion, str):
            raise SignalError("mask", "a function of completion_ids needs ids, and this rollout is text", signal)
        ids = np.asarray(self.completion, np.int64)
        counted = np.asarray(mask(ids))
        if counted.shape != ids.shape:
            raise SignalError("mask", f"it gave the shape {counted.shape} for {ids.shape}", signal)
        return counted.astype(bool) if given is None else counted.astype(bool) & given


def distinct_masks(signals: Sequence[ProbeSignal]) -> dict[Mask, str]:
    """Each mask that some signal has, with the name of one that has it."""
    found: dict[Mask, str] = {}
    for signal in signals:
        found.setdefault(signal.mask, signal.name)  # type: ignore[arg-type] # parsed when the signal was made
    return found


@dataclass(frozen=True)
class Request:
    """Rollouts as groups to score: those with one prompt together, a completion once for each distinct mask.

    A completion that is sent several times is computed once by the server.

    Attributes:
        groups: what to send.
        sent: for each completion of each group, the index of its rollout and of its mask.
    """

    groups: list[RolloutGroup]
    sent: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], indices: Sequence[int], masks: dict[Mask, str]) -> Request:
        """The request for some of the rollouts."""
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
