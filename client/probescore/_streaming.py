"""Plans, without any input or output, the RPCs of the client's method ``score_stream``, which scores a stream of rollouts: how rollout
groups are divided into RPCs, and which completions of an RPC still lack scores.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Union

from probescore._answers import AnswerCheck
from probescore._group_sources import LINGER_SECONDS, GroupRead, SourceEnded
from probescore._reading_versions import VersionsOfCall
from probescore._status import invalid_request, malformed_answer
from probescore.errors import FieldViolation, InvalidRequestError, ProbescoreError
from probescore.types import RolloutGroup, StreamedCompletion
from probescore.v1 import scoring_pb2
from probescore.wire import MessageError, group_to_proto, streamed_from_proto

_SENT_PATH = re.compile(r"groups\[(?P<group>\d+)\](?:\.completions\[(?P<completion>\d+)\])?")


@dataclass(frozen=True)
class StreamWindow:
    """Limits on how much of an endless stream of rollout groups is under way at a time.

    Attributes:
        groups_per_call: maximum number of rollout groups in one RPC.
        tokens_per_call: maximum number of tokens in one RPC, a prompt counted once; each token counts once for each reading that is asked
            for. A larger group is sent in several RPCs. A text counts as many tokens as it has characters, since the client does not
            tokenise text. Keep this number at or below the server's ``max_request_tokens``.
        calls_in_flight: maximum number of RPCs whose scores have not all been handed out to the caller.
        completions_per_call: maximum number of completions and follow-ups (token ids appended to a completion) in one RPC; a larger group
            is sent in several RPCs. Keep this number at or below the server's ``max_request_rollouts``.
    """

    groups_per_call: int = 16
    tokens_per_call: int = 32_768
    calls_in_flight: int = 4
    completions_per_call: int = 4096

    def __post_init__(self) -> None:
        for name in ("groups_per_call", "tokens_per_call", "calls_in_flight", "completions_per_call"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


Position = tuple[int, int]
"""A pair of indices: the index of a rollout group in the stream, and the index of a completion in that group."""


@dataclass(eq=False)
class Chunk:
    """The completions that one RPC of a stream (many RPCs for one call of a client's method) sends, until the results of each completion
    have arrived once.
    """

    prompts: dict[int, scoring_pb2.Prompt] = field(default_factory=dict)
    missing: dict[Position, scoring_pb2.Completion] = field(default_factory=dict)
    tokens: int = 0
    completions: int = 0
    _sent: list[list[Position]] = field(default_factory=list)

    def add(
        self, group: int, prompt: scoring_pb2.Prompt, parts: dict[Position, scoring_pb2.Completion], tokens: int, completions: int
    ) -> None:
        """Adds completions of one rollout group to a chunk, the content of one RPC, and their numbers to its totals. Together with their
        follow-ups (token ids appended to a completion) the completions count as ``completions`` completions; together with their prompt
        they have ``tokens`` tokens.
        """
        self.prompts[group] = prompt
        self.missing.update(parts)
        self.tokens += tokens
        self.completions += completions

    def _groups_to_send(self) -> list[scoring_pb2.RolloutGroup]:
        """Returns rollout groups, to be sent in one request, with those completions of an RPC that still lack results, and stores the
        positions of the completions in that request.
        """
        self._sent = []
        groups: list[scoring_pb2.RolloutGroup] = []
        last = None
        for (group, completion), message in self.missing.items():
            if group != last:
                groups.append(scoring_pb2.RolloutGroup(prompt=self.prompts[group]))
                self._sent.append([])
                last = group
            groups[-1].completions.append(message)
            self._sent[-1].append((group, completion))
        return groups

    def check_complete(self) -> None:
        """Checks, at the end of an RPC, that results of each of the RPC's completions have arrived.

        Raises:
            ServerError: a completion is missing.
        """
        if self.missing:
            raise malformed_answer(f"the stream ended without {len(self.missing)} of its completions")

    def relocated(self, error: ProbescoreError) -> ProbescoreError:
        """Returns a copy of an error of one RPC of a stream, in which fields are named by their place in the stream instead of their place
        in the RPC.
        """
        if not error.violations:
            return error

        def relocated(text: str) -> str:
            return _SENT_PATH.sub(self._path, text)

        violations = tuple(FieldViolation(relocated(entry.field), relocated(entry.problem)) for entry in error.violations)
        if isinstance(error, InvalidRequestError):
            message = "; ".join(f"{entry.field}: {entry.problem}" for entry in violations)
        else:
            message = relocated(error.message)
        return type(error)(message, error.code, error.reason, violations, error.retry_seconds)

    def _path(self, sent: re.Match[str]) -> str:
        group, completion = int(sent["group"]), int(sent["completion"] or 0)
        if group >= len(self._sent) or completion >= len(self._sent[group]):
            return sent[0]
        there = self._sent[group][completion]
        return f"groups[{there[0]}]" + (f".completions[{there[1]}]" if sent["completion"] else "")


@dataclass(eq=False)
class ScoreChunk(Chunk):
    """The completions that one RPC ``ScoreStream`` sends, until the scores of each completion have arrived once."""

    _check: AnswerCheck | None = None

    def request(self, template: scoring_pb2.ScoreRequest) -> scoring_pb2.ScoreStreamRequest:
        """Returns a request message for those completions of one RPC that still lack scores, with the options of a template message."""
        stream = scoring_pb2.ScoreStreamRequest(request=template)
        stream.request.groups.extend(self._groups_to_send())
        self._check = AnswerCheck(stream.request)
        return stream

    def accept(self, message: scoring_pb2.ScoreStreamResponse) -> list[StreamedCompletion]:
        """Accepts one message of the response to the last message that ``request`` returned; returns the message's completions with their
        indices in the stream.

        Raises:
            ServerError: the message violates the protobuf contract, scores a completion twice or one that was not requested, or does not
                match the request's options.
            MismatchError: the server's model or tokenizer is not the one that the request expects.
        """
        try:
            answers = streamed_from_proto(message)
            if answers and self._check is not None:
                self._check.check_info(answers[0].info)
            return [self._accepted(answer) for answer in answers]
        except MessageError as error:
            raise malformed_answer(error) from None

    def _accepted(self, answer: StreamedCompletion) -> StreamedCompletion:
        try:
            position = self._sent[answer.group_index][answer.completion_index]
            del self.missing[position]
        except (IndexError, KeyError):
            where = f"groups[{answer.group_index}].completions[{answer.completion_index}]"
            raise malformed_answer(f"{where} was not asked for, or answered before") from None
        if self._check is not None:
            field = f"groups[{position[0]}].completions[{position[1]}]"
            self._check.check_completion(answer.group_index, answer.completion_index, answer.scores, field)
        return replace(answer, group_index=position[0], completion_index=position[1])


class Chunker:
    """Chunker that divides a stream of rollout groups into chunks of at most ``groups_per_call`` groups and ``tokens_per_call`` tokens;
    each chunk is sent in one RPC. Each token counts ``passes`` times: the model reads it once for each reading.
    """

    def __init__(self, window: StreamWindow, passes: int = 1) -> None:
        self._window = window
        self._passes = passes
        self._chunk = ScoreChunk()
        self._groups = 0

    def add(self, group: RolloutGroup) -> Iterator[ScoreChunk]:
        """Adds the next rollout group of the stream; yields the chunks (each the content of one RPC) that the group fills.

        Raises:
            InvalidRequestError: the group cannot be sent; the error names the group's place in the stream.
        """
        index = self._groups
        self._groups += 1
        name = f"groups[{index}]"
        try:
            message = group_to_proto(group, name)
        except MessageError as error:
            raise invalid_request(error) from None
        if not message.completions:
            raise invalid_request(MessageError(f"{name}.completions", "is empty; expected at least one"))
        sizes = [(self._passes * _completion_tokens(completion), _with_follow_ups(completion)) for completion in message.completions]
        prompt_tokens = self._passes * _prompt_tokens(message.prompt)
        if self._is_too_much(self._chunk.tokens + prompt_tokens + sum(size for size, _ in sizes), sum(count for _, count in sizes)):
            yield from self.rest()
        part: dict[Position, scoring_pb2.Completion] = {}
        tokens, parts = prompt_tokens, 0
        for position, (completion, (size, count)) in enumerate(zip(message.completions, sizes, strict=True)):
            if part and self._is_too_much(tokens + size, parts + count):
                self._chunk.add(index, message.prompt, part, tokens, parts)
                yield from self.rest()
                part, tokens, parts = {}, prompt_tokens, 0
            part[index, position] = completion
            tokens, parts = tokens + size, parts + count
        self._chunk.add(index, message.prompt, part, tokens, parts)
        if len(self._chunk.prompts) == self._window.groups_per_call:
            yield from self.rest()

    def _is_too_much(self, tokens: int, completions: int) -> bool:
        """Returns whether the given numbers of tokens and completions would bring the current chunk (the content of one RPC) above the
        limits of an RPC.
        """
        return tokens > self._window.tokens_per_call or self._chunk.completions + completions > self._window.completions_per_call

    @property
    def has_rest(self) -> bool:
        """Returns whether the current, unfinished chunk (the content of one RPC) contains any completion."""
        return bool(self._chunk.missing)

    def rest(self) -> Iterator[ScoreChunk]:
        """Yields the current, unfinished chunk (the content of one RPC) if it contains any completion, and starts a new chunk."""
        if self._chunk.missing:
            chunk, self._chunk = self._chunk, ScoreChunk()
            yield chunk


Arrival = Union[GroupRead, SourceEnded, list[StreamedCompletion], ScoreChunk, Exception]
"""An event in a stream: a group or the end from the source, a list of scored completions, a chunk whose RPC has ended, or the exception
that made an RPC fail.
"""


class StreamSchedule:
    """Scheduler of one call of the client's method ``score_stream``, which scores a stream of rollouts: decides when to read the next
    rollout group, which chunk to send, and how long to wait.

    An RPC contains as many groups as the window allows, unless the source keeps the client waiting: then the groups read so far are sent,
    since the source may be waiting for their scores. The synchronous and the asynchronous client repeat the following steps until
    ``finished``: send each ``next_chunk()``, read a group if ``wants_group()``, wait for an event for ``patience`` seconds, and hand out
    the completions that ``accept()`` returns.

    Args:
        window: limits on what is under way.
        readings: number of readings that each request names; 0 = none, and the frozen model alone reads.
    """

    def __init__(self, window: StreamWindow, readings: int = 0) -> None:
        self._window = window
        self._chunker = Chunker(window, max(readings, 1))
        self._ready: deque[ScoreChunk] = deque()
        self._under_way = 0
        self._reading = False
        self._ended = False
        self._versions = VersionsOfCall("stream", "scores")
        self.failure: BaseException | None = None
        """The exception that the source raised, or ``None``; it must be raised to the caller once the scores of all groups read before it
        have arrived."""

    @property
    def finished(self) -> bool:
        """Returns whether the source of rollout groups has ended and the scores of all its groups have arrived."""
        return self._ended and not self._ready and not self._under_way

    @property
    def patience(self) -> float | None:
        """Returns the seconds for which a client waits for the next event of a stream before it calls ``kept_waiting()``, which sends the
        rollout groups read so far; ``None`` if no group could be sent.
        """
        return LINGER_SECONDS if self._reading and self._chunker.has_rest and self._has_room else None

    @property
    def _has_room(self) -> bool:
        return self._under_way < self._window.calls_in_flight

    def next_chunk(self) -> ScoreChunk | None:
        """Returns the chunk (the content of one RPC) that the client must send now, or ``None`` if there is none. The chunk counts as under
        way until ``accept`` is called with the chunk.
        """
        if not (self._ready and self._has_room):
            return None
        self._under_way += 1
        return self._ready.popleft()

    def wants_group(self) -> bool:
        """Returns whether the client must read another rollout group now; if true, the next ``GroupRead`` or ``SourceEnded`` event is the
        result of that reading.
        """
        wants = not (self._reading or self._ended or self._ready) and self._has_room
        self._reading = self._reading or wants
        return wants

    def kept_waiting(self) -> None:
        """Makes the rollout groups that were read so far ready to be sent, although they are fewer than one RPC may contain."""
        self._ready.extend(self._chunker.rest())

    def accept(self, arrival: Arrival) -> list[StreamedCompletion]:
        """Handles an event of a stream of rollout groups, such as a group that was read or the end of an RPC, and returns the scored
        completions that the event contains.

        A group that cannot be sent ends the reading of the source; the error is kept in ``failure``.

        Raises:
            Exception: the event is the exception of a failed RPC, which is raised unchanged.
            MismatchError: the scores are of another version of a reading than those that came before.
        """
        match arrival:
            case GroupRead(group):
                self._reading = False
                try:
                    self._ready.extend(self._chunker.add(group))
                except Exception as error:  # whatever a user's object raises
                    self._end(error)
            case SourceEnded(error):
                self._end(error)
            case ScoreChunk():
                self._under_way -= 1
            case Exception():
                raise arrival
            case completions:
                for reading in completions[0].info.readings if completions else ():
                    self._versions.check(reading)
                return completions
        return []

    def _end(self, failure: BaseException | None) -> None:
        self._reading, self._ended, self.failure = False, True, failure
        self.kept_waiting()


def _prompt_tokens(prompt: scoring_pb2.Prompt) -> int:
    if prompt.WhichOneof("form") == "ids":
        return prompt.ids.shape[0]
    return len(prompt.text.text) + sum(len(message.content) for message in prompt.chat.messages)


def _with_follow_ups(completion: scoring_pb2.Completion) -> int:
    """Returns by how much a completion counts against the limit on completions in one RPC: 1, and 1 for each of its follow-ups (token ids
    appended to a completion).
    """
    return 1 + sum(map(_with_follow_ups, completion.follow_ups))


def _completion_tokens(completion: scoring_pb2.Completion) -> int:
    own = completion.ids.shape[0] if completion.WhichOneof("form") == "ids" else len(completion.text)
    return own + sum(_completion_tokens(follow_up) for follow_up in completion.follow_ups)
