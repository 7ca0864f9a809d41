"""Holds the calls that wait for a worker, and chooses which of their rollouts make the next batch.

* Jobs take turns. A turn is one prompt: the next group of the job whose turn it is, and then whatever else waits for the same prompt, first
  in this job's other calls, then in those of other jobs, group by group while there is room. The prompt is computed, and counted, once.
* A job whose group joins another job's turn has had its own turn. So a job waits for at most one turn of each job before it, whatever
  joins those turns.
* Within a job, calls of higher priority go first, and then those that came first.
* Rollouts of one prompt stay together: a group is split only if it is larger than a whole batch, and joins another job's turn only as a
  whole. A job whose group does not fit keeps its place: it goes first in the next batch, where the whole budget is free for it.
* A batch that has ``MAX_CONTINUATIONS`` completions and follow-ups takes no more, however short they are: each takes some time of its own.
* Identical rollouts are taken together, for the tokens of one, and cost no job a turn.
* A call whose reader has a whole batch of delivered results unread gets nothing new computed until its reader has caught up.
"""

from __future__ import annotations

import bisect
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from probescore_server.scheduling.call import Call, RequestedRollout, WaitingGroup
from probescore_server.scheduling.ordered_set import OrderedSet

MAX_CONTINUATIONS = 1024
"""A batch that has at least this many completions and follow-ups takes no further rollout."""

Duplicates = list[RequestedRollout]
"""Is the type of a list of identical rollouts, which are computed once; it is never empty."""


@dataclass(eq=False, slots=True)
class _WaitingPrompt:
    """Holds the waiting rollouts of all calls that have the same prompt.

    Attributes:
        tokens: the number of tokens of the prompt.
        groups: the waiting groups with this prompt, in order of arrival.
        identical: by ``RequestedRollout.key``: the identical rollouts that wait, each with the group that it waits in.
    """

    tokens: int
    groups: OrderedSet[WaitingGroup] = field(default_factory=OrderedSet)
    identical: dict[object, dict[RequestedRollout, WaitingGroup]] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _NextBatch:
    """Holds a batch that is being put together.

    Attributes:
        left: the number of tokens that still fit.
        taken: the rollouts that were taken, identical ones together.
        continuations: the number of completions and follow-ups that were taken.
    """

    left: int
    taken: list[Duplicates] = field(default_factory=list)
    continuations: int = 0

    def fits(self, tokens: int) -> bool:
        """Tells whether the batch has room for a rollout of so many tokens; for its first rollout it always has."""
        return not self.taken or (tokens <= self.left and self.continuations < MAX_CONTINUATIONS)


class WaitingQueue:
    """Holds the calls that have rollouts waiting for a worker, and makes batches of them.

    Args:
        max_unread_tokens: a call with so many tokens of delivered but unread results gets nothing more computed for now.

    Attributes:
        tokens: the number of tokens that wait, a prompt counted once per group.
        rollouts: the number of rollouts that wait.
    """

    def __init__(self, max_unread_tokens: int) -> None:
        self.tokens = 0
        self.rollouts = 0
        self._max_unread_tokens = max_unread_tokens
        self._jobs: OrderedDict[str, list[Call]] = OrderedDict()  # The job whose turn is next comes first.
        self._prompts: dict[bytes, _WaitingPrompt] = {}
        self._distinct_tokens = 0  # A prompt counts once, and identical rollouts count once.

    def __iter__(self) -> Iterator[Call]:
        return (call for calls in self._jobs.values() for call in calls)

    # ------------------------------------------------------------------------------------------------------------- coming, leaving

    def add(self, groups: Iterable[WaitingGroup]) -> None:
        """Adds groups of rollouts to the queue, each behind those groups of its call that wait already."""
        for group in groups:
            call = group.call
            if not call.waiting:
                bisect.insort(self._jobs.setdefault(call.job, []), call, key=lambda queued: (-queued.priority, queued.admitted))
            call.waiting.add(group)
            self._index(group)

    def put_back(self, items: Iterable[RequestedRollout]) -> None:
        """Puts rollouts that had been taken back into the queue, before all others of their call, and gives its job the next turn."""
        by_group: dict[tuple[Call, int], OrderedSet[RequestedRollout]] = {}
        for item in items:
            by_group.setdefault((item.call, item.group), OrderedSet()).add(item)
        for (call, _), returned in by_group.items():
            group = WaitingGroup(call, next(iter(returned)).key[0], returned)
            others = list(call.waiting)
            self.add([group])
            for other in others:
                call.waiting.move_to_end(other)
            self._jobs.move_to_end(call.job, last=False)

    def drop(self, call: Call) -> None:
        """Removes all waiting rollouts of a call, that is, of one request, from the queue."""
        for group in list(call.waiting):
            for item in list(group.items):
                self._remove(item, group)

    def _index(self, group: WaitingGroup) -> None:
        self.tokens += group.tokens
        self.rollouts += len(group.items)
        prompt = self._prompts.get(group.prompt)
        if prompt is None:
            prompt = self._prompts[group.prompt] = _WaitingPrompt(group.prompt_tokens)
            self._distinct_tokens += prompt.tokens
        prompt.groups.add(group)
        for item in group.items:
            identical = prompt.identical.setdefault(item.key, {})
            if not identical:
                self._distinct_tokens += item.tokens
            identical[item] = group

    def _remove(self, item: RequestedRollout, group: WaitingGroup) -> None:
        prompt = self._prompts[group.prompt]
        identical = prompt.identical[item.key]
        del identical[item]
        if not identical:
            del prompt.identical[item.key]
            self._distinct_tokens -= item.tokens
        self.tokens -= group.remove(item)
        self.rollouts -= 1
        if not group.items:
            prompt.groups.remove(group)
            group.call.waiting.remove(group)
            if not group.call.waiting:
                self._leave(group.call)
        if not prompt.groups:
            del self._prompts[group.prompt]
            self._distinct_tokens -= prompt.tokens

    def _leave(self, call: Call) -> None:
        calls = self._jobs[call.job]
        calls.remove(call)
        if not calls:
            del self._jobs[call.job]

    # --------------------------------------------------------------------------------------------------------------- the next batch

    def expired(self, now: float) -> list[Call]:
        """Returns the waiting calls whose deadline is not after ``now``, in seconds on the scheduler's clock."""
        return [call for call in self if call.deadline <= now]

    def holds(self, tokens: int) -> bool:
        """Tells whether at least ``tokens`` tokens wait that a batch may take now; a prompt and identical rollouts are counted once."""
        if self._distinct_tokens < tokens:
            return False
        behind = sum(group.tokens for call in self if self._is_behind(call) for group in call.waiting)
        return self._distinct_tokens - behind >= tokens

    def next_batch(self, max_tokens: int) -> tuple[list[Duplicates], int]:
        """Removes the rollouts of the next batch from the queue, and returns them with the batch's number of tokens.

        The batch has more than ``max_tokens`` tokens only if it is a single rollout.
        """
        room = _NextBatch(max_tokens)
        turns = deque(self._jobs)
        joined: Counter[str] = Counter()  # These are turns that jobs had in advance.
        while turns:
            job = turns.popleft()
            if joined[job]:
                joined[job] -= 1
            elif not self._take_turn(job, room, joined):
                continue
            if job in self._jobs:
                turns.append(job)
        return room.taken, max_tokens - room.left

    def _take_turn(self, job: str, room: _NextBatch, joined: Counter[str]) -> bool:
        """Moves the next group of a job, and other waiting groups with the same prompt, into the batch that is being put together.

        It returns whether the job had a group that may be taken and that fitted.
        """
        group = self._next_group(job)
        if group is None or not room.fits(group.tokens):
            return False
        prompt = self._prompts[group.prompt]
        room.left -= prompt.tokens
        self._take(group, room)
        self._end_turn(job)
        for other in sorted(prompt.groups, key=lambda other: other.call.job != job):
            fits = other in prompt.groups and room.fits(other.tokens - prompt.tokens)
            if other is not group and fits and not self._is_behind(other.call):
                self._take(other, room)
                if other.call.job != job:
                    joined[other.call.job] += 1
                    self._end_turn(other.call.job)
        return True

    def _next_group(self, job: str) -> WaitingGroup | None:
        call = next((call for call in self._jobs.get(job, ()) if not self._is_behind(call)), None)
        return None if call is None else next(iter(call.waiting))

    def _take(self, group: WaitingGroup, room: _NextBatch) -> None:
        """Moves those rollouts of a group that fit, and all waiting ones that are identical to them, into the batch.

        All of them fit unless the group alone is larger than a batch.
        """
        prompt = self._prompts[group.prompt]
        for item in list(group.items):
            if item not in group.items:
                continue  # It was taken with an identical one before it.
            if not room.fits(item.tokens):
                break
            twins = [(twin, home) for twin, home in prompt.identical[item.key].items() if not self._is_behind(twin.call)]
            for twin, home in twins:
                self._remove(twin, home)
            room.taken.append([twin for twin, _ in twins])
            room.left -= item.tokens
            room.continuations += item.rollout.completion.tree_size

    def _end_turn(self, job: str) -> None:
        if job in self._jobs:
            self._jobs.move_to_end(job)

    def _is_behind(self, call: Call) -> bool:
        return call.unread_tokens >= self._max_unread_tokens
