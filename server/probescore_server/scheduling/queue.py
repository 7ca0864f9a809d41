"""Queues the calls (each the work of one request) that wait for a worker process, and chooses the rollouts of the next batch.

* Training jobs take turns. A turn is one prompt: the next group (rollouts of one request with one prompt) of the job whose turn it is, and
  then all other waiting groups with the same prompt, first from this job's other calls, then from those of other jobs, while there is room.
  The prompt is computed, and counted, once.
* A job whose group joins another job's turn has thereby used its own turn. So a job waits for at most one turn of each job before it,
  however many groups join those turns.
* Within a job, calls of higher priority go first, and then earlier calls.
* Rollouts of one prompt stay together: a group is split only if it is larger than a whole batch, and joins another job's turn only as a
  whole. A job whose group does not fit keeps its place: its group is the first of the next batch, whose whole token budget is then free.
* A batch that has ``MAX_CONTINUATIONS`` completions and follow-ups (texts that continue a completion) takes no more, however short they
  are, since each takes a fixed amount of time besides that for its tokens.
* A rollout counts once for each reading that its request names, and for each adapter that its probes bring. A prompt is shared among
  requests that are read with the same weights.
* Identical rollouts are taken together, count with the tokens of one, and use up no job's turn.
* A batch takes no more rollouts whose activations are read once these have ``MAX_ACTIVATION_BYTES`` bytes, which bounds what a worker sends
  at a time; such a group may be split.
* If a whole batch of a call's results is delivered but unread, no more of the call's rollouts are computed until these results are read.
"""

from __future__ import annotations

import bisect
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from probescore_server.scheduling.call import Call, PromptKey, RequestedRollout, WaitingGroup
from probescore_server.scheduling.ordered_set import OrderedSet

MAX_CONTINUATIONS = 1024
"""Number of completions and follow-ups (texts that continue a completion) in a batch from which on the batch takes no further rollout."""

MAX_ACTIVATION_BYTES = 1 << 26
"""Limits the bytes of activations in the response to one batch, and those of one call that are delivered but unread when more of the call's
rollouts are computed. A single rollout may have more.
"""

Duplicates = list[RequestedRollout]
"""Type of a list of identical rollouts, which are computed once; the list is never empty."""


@dataclass(eq=False, slots=True)
class _WaitingPrompt:
    """Record of the waiting rollouts of all calls (requests) that have the same prompt, read with the same weights.

    Attributes:
        tokens: the number of tokens of the prompt.
        groups: the waiting groups with this prompt, in order of arrival.
        identical: a dictionary, keyed by ``RequestedRollout.key``, of the identical rollouts that wait, each with the group that the
            rollout belongs to.
    """

    tokens: int
    groups: OrderedSet[WaitingGroup] = field(default_factory=OrderedSet)
    identical: dict[object, dict[RequestedRollout, WaitingGroup]] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _NextBatch:
    """Batch of rollouts that is being put together.

    Attributes:
        left: the number of tokens for which the batch still has room.
        taken: the rollouts in the batch, as lists of identical rollouts, each list computed once.
        continuations: the number of completions and follow-ups (texts that continue a completion) in the batch.
        activation_bytes: the number of bytes of activations in the response to the batch.
    """

    left: int
    taken: list[Duplicates] = field(default_factory=list)
    continuations: int = 0
    activation_bytes: int = 0

    def fits(self, tokens: int, activation_bytes: int) -> bool:
        """Returns whether a batch of rollouts has room for a rollout of ``tokens`` tokens whose activations have ``activation_bytes``
        bytes. An empty batch has room for any rollout.
        """
        if not self.taken:
            return True
        has_bytes = not activation_bytes or self.activation_bytes + activation_bytes <= MAX_ACTIVATION_BYTES
        return tokens <= self.left and self.continuations < MAX_CONTINUATIONS and has_bytes


class WaitingQueue:
    """Queue of the calls (each the work of one request) with rollouts that wait for a worker process. The queue forms the batches.

    Args:
        max_unread_tokens: the number of tokens of delivered but unread results from which on no more rollouts of a call are computed.

    Attributes:
        tokens: the number of tokens that wait, a prompt counted once per group.
        rollouts: the number of rollouts that wait.
    """

    def __init__(self, max_unread_tokens: int) -> None:
        self.tokens = 0
        self.rollouts = 0
        self._max_unread_tokens = max_unread_tokens
        self._jobs: OrderedDict[str, list[Call]] = OrderedDict()  # The job whose turn is next comes first.
        self._prompts: dict[PromptKey, _WaitingPrompt] = {}
        self._distinct_tokens = 0  # A prompt counts once, and identical rollouts count once.

    def __iter__(self) -> Iterator[Call]:
        return (call for calls in self._jobs.values() for call in calls)

    # ------------------------------------------------------------------------------------------------------------- coming, leaving

    def add(self, groups: Iterable[WaitingGroup]) -> None:
        """Adds groups of rollouts (each with one prompt) to the queue, each behind those groups of the same request that wait already."""
        for group in groups:
            call = group.call
            if not call.waiting:
                bisect.insort(self._jobs.setdefault(call.job, []), call, key=lambda queued: (-queued.priority, queued.admitted))
            call.waiting.add(group)
            self._index(group)

    def put_back(self, items: Iterable[RequestedRollout]) -> None:
        """Puts rollouts that had been taken out of the queue back, before all other rollouts of their request, and gives their training job
        the next turn.
        """
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
        """Removes all waiting rollouts of a call (the work of one request) from the queue."""
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
        """Returns the waiting calls (each the work of one request) whose deadline is not after ``now``, in seconds on the scheduler's
        clock.
        """
        return [call for call in self if call.deadline <= now]

    def holds(self, tokens: int) -> bool:
        """Returns whether the queue of waiting rollouts has at least ``tokens`` tokens that a batch for a worker process may take now. A
        prompt and identical rollouts are counted once.
        """
        if self._distinct_tokens < tokens:
            return False
        behind = sum(group.tokens for call in self if self._is_behind(call) for group in call.waiting)
        return self._distinct_tokens - behind >= tokens

    def next_batch(self, max_tokens: int) -> tuple[list[Duplicates], int]:
        """Removes the rollouts of the next batch from the queue of waiting rollouts, and returns them with the batch's number of tokens.

        The batch has more than ``max_tokens`` tokens only if it consists of a single rollout.
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
        """Moves the next waiting group of rollouts (a prompt with its completions) of a training job, and other waiting groups with the
        same prompt, from the queue into the batch that is being put together.

        Returns whether the job had a group that may be computed now and that fitted into the batch.
        """
        group = self._next_group(job)
        if group is None or not room.fits(group.tokens, _first_bytes(group)):
            return False
        prompt = self._prompts[group.prompt]
        room.left -= prompt.tokens
        self._take(group, room)
        self._end_turn(job)
        for other in sorted(prompt.groups, key=lambda other: other.call.job != job):
            fits = other in prompt.groups and room.fits(other.tokens - prompt.tokens, _first_bytes(other))
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
        """Moves the rollouts of a waiting group (a prompt with its completions) from the queue into the next batch, as far as they fit,
        together with all waiting rollouts that are identical to them.

        The whole group fits unless the group alone is larger than a batch, or its activations are larger than a response may be.
        """
        prompt = self._prompts[group.prompt]
        for item in list(group.items):
            if item not in group.items:
                continue  # It was taken with an identical one before it.
            if not room.fits(item.tokens, item.activation_bytes):
                break
            twins = [(twin, home) for twin, home in prompt.identical[item.key].items() if not self._is_behind(twin.call)]
            for twin, home in twins:
                self._remove(twin, home)
            room.taken.append([twin for twin, _ in twins])
            room.left -= item.tokens
            room.continuations += item.rollout.completion.tree_size
            room.activation_bytes += item.activation_bytes

    def _end_turn(self, job: str) -> None:
        if job in self._jobs:
            self._jobs.move_to_end(job)

    def _is_behind(self, call: Call) -> bool:
        return call.unread_tokens >= self._max_unread_tokens or call.unread_activation_bytes >= MAX_ACTIVATION_BYTES


def _first_bytes(group: WaitingGroup) -> int:
    return next(iter(group.items)).activation_bytes
