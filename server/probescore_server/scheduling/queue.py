"""What waits, and which of it makes the next batch.

* Jobs take turns. A turn is one prompt: the next group of the job whose turn it is, and then whatever else waits for the same prompt, first
  in this job's other calls, then in those of others, group by group while there is room. The prompt is computed, and counted, once.
* Who joins another's turn has had one. So a job comes after at most one turn of each job before it, whatever joins them.
* Within a job: higher priority first, then first come, first served.
* Rollouts of one prompt stay together: a group is split only if it is larger than a whole batch, and joins another's turn only as a whole.
  A job whose group does not fit keeps its place: it goes first in the next batch, where all the room is its own.
* A batch that has `MAX_CONTINUATIONS` takes no more, however short they are: each takes some time of its own.
* Identical rollouts are taken together, for the tokens of one, and cost nobody a turn.
* A reader who is a batch behind gets no more than what is on its way until it has caught up.
"""

from __future__ import annotations

import bisect
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from probescore_server.scheduling.call import Call, RequestedRollout, WaitingGroup
from probescore_server.scheduling.ordered_set import OrderedSet

MAX_CONTINUATIONS = 1024
"""Completions and follow-ups, with which a batch takes no further rollout."""

Duplicates = list[RequestedRollout]
"""Rollouts of one content, to be computed once; never empty."""


@dataclass(eq=False, slots=True)
class _WaitingPrompt:
    """What waits for one prompt.

    Attributes:
        groups: in order of arrival.
        identical: by `RequestedRollout.key`, the group that each of these items waits in.
    """

    tokens: int
    groups: OrderedSet[WaitingGroup] = field(default_factory=OrderedSet)
    identical: dict[object, dict[RequestedRollout, WaitingGroup]] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _NextBatch:
    """A batch that is being made, how many tokens still fit in, and how many completions and follow-ups it has."""

    left: int
    taken: list[Duplicates] = field(default_factory=list)
    continuations: int = 0

    def fits(self, tokens: int) -> bool:
        """Whether there is room for so many tokens; for the first there always is."""
        return not self.taken or (tokens <= self.left and self.continuations < MAX_CONTINUATIONS)


class WaitingQueue:
    """The calls that wait.

    Args:
        max_unread_tokens: who has so many delivered and not yet read gets nothing more.

    Attributes:
        tokens: as they were admitted: a prompt once per group.
        rollouts: how many.
    """

    def __init__(self, max_unread_tokens: int) -> None:
        self.tokens = 0
        self.rollouts = 0
        self._max_unread_tokens = max_unread_tokens
        self._jobs: OrderedDict[str, list[Call]] = OrderedDict()  # the next turn first
        self._prompts: dict[bytes, _WaitingPrompt] = {}
        self._distinct_tokens = 0  # a prompt once, and identical rollouts once

    def __iter__(self) -> Iterator[Call]:
        return (call for calls in self._jobs.values() for call in calls)

    # ------------------------------------------------------------------------------------------------------------- coming, leaving

    def add(self, groups: Iterable[WaitingGroup]) -> None:
        """Queues groups behind those of their calls that wait already."""
        for group in groups:
            call = group.call
            if not call.waiting:
                bisect.insort(self._jobs.setdefault(call.job, []), call, key=lambda queued: (-queued.priority, queued.admitted))
            call.waiting.add(group)
            self._index(group)

    def put_back(self, items: Iterable[RequestedRollout]) -> None:
        """Queues what was taken once more, before everything else of its call, which goes first in its job's next turn."""
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
        """Removes all of a call that waits."""
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
        """The calls whose deadline has passed."""
        return [call for call in self if call.deadline <= now]

    def holds(self, tokens: int) -> bool:
        """Whether there are so many tokens to take now, a prompt and identical rollouts counted once."""
        if self._distinct_tokens < tokens:
            return False
        behind = sum(group.tokens for call in self if self._is_behind(call) for group in call.waiting)
        return self._distinct_tokens - behind >= tokens

    def next_batch(self, max_tokens: int) -> tuple[list[Duplicates], int]:
        """Takes the next batch, and says how many tokens it has: more than `max_tokens` only if it is a single rollout."""
        room = _NextBatch(max_tokens)
        turns = deque(self._jobs)
        joined: Counter[str] = Counter()  # turns that were had in advance
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
        """Takes the next group of a job, and what else waits for its prompt; returns whether there was one and it fitted."""
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
        """Takes the items of a group that fit, with their identical ones elsewhere: all, unless it alone is larger than a batch."""
        prompt = self._prompts[group.prompt]
        for item in list(group.items):
            if item not in group.items:
                continue  # taken with an identical one before it
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
