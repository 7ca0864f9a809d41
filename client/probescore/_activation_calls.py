"""Plans, without any input or output, the RPCs of the client's method ``activations``, which reads a model's activations from a server: how
rollout groups are divided into RPCs, and how the parts that a server sends become the activations of each completion.
"""

from __future__ import annotations

import fnmatch
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Union

import numpy as np
from numpy.typing import NDArray

from probescore._reading_versions import VersionsOfCall, check_readings
from probescore._status import invalid_request, malformed_answer
from probescore._streaming import Chunk, Position
from probescore.errors import FieldViolation, MismatchError, ServerError
from probescore.types import ActivationsInfo, CompletionActivations, CompletionStatus, Pool, RolloutGroup, Scope, ServerInfo, Tap, Usage
from probescore.types.readings import name_problem
from probescore.v1 import activations_pb2, scoring_pb2
from probescore.wire import (
    ActivationOptions,
    MessageError,
    activation_options_from_request,
    activation_options_to_proto,
    activations_info_from_proto,
    group_to_proto,
    rows_from_proto,
)
from probescore.wire.enums import POOLS, STATUSES, member_of
from probescore.wire.number_formats import NUMBER_FORMATS
from probescore.wire.tensors import INT32, tensor_to_array

BYTES_PER_CALL = 1 << 26
"""Default limit on the bytes of activations in the response to one RPC, which a client holds at once."""

TOKENS_PER_CALL = 32_768
COMPLETIONS_PER_CALL = 4096


class ReadOptions(TypedDict, total=False):
    """Types of the keyword arguments of the client's method ``activations`` (a ``TypedDict``), which determine what is read of a model's
    activations. All are optional.

    Attributes:
        pool: what the server sends of the tokens that count under a completion's mask: ``"tokens"`` for every token's activations,
            ``"mean"``, ``"last"`` or ``"max"``, or several of these; default: ``"tokens"``.
        dtype: format in which numbers are sent: ``"float32"``, ``"bfloat16"`` (half the bytes) or ``"float16"`` (half the bytes, and
            refused for large numbers); default: ``"float32"``. Arrays are float32 in any case.
        scope: the tokens to read; default: those of the completion.
        expected_model_fingerprint: fingerprint of a model; the RPC fails with ``MismatchError`` if the server runs another model.
        expected_tokenizer_fingerprint: fingerprint of a tokenizer; the RPC fails with ``MismatchError`` if the server runs another one.
        priority: an integer from -100 to 100; among the requests of one training run, those of higher priority are read first; default: 0.
        run_id: name of the run in the server's logs, at most 256 bytes.
        reading: whose activations are read: ``"frozen"``, or a name given to ``load_reading``; default: the frozen model's. All activations
            of one call are of the same version of a reading: if its name comes to mean another version during the call, the call fails with
            ``MismatchError``.
    """

    pool: Union[str, Sequence[str]]
    dtype: str
    scope: Union[Scope, str]
    expected_model_fingerprint: str
    expected_tokenizer_fingerprint: str
    priority: int
    run_id: str
    reading: str


def read_template(taps: str | Tap | Sequence[str | Tap], options: ReadOptions) -> activations_pb2.ReadActivationsRequest:
    """Returns a request message with the options that all requests of one call of the client's method ``activations`` share; raises
    ``InvalidRequestError`` for a value that cannot be sent.
    """
    try:
        return activation_options_to_proto(_options(taps, **options))
    except MessageError as error:
        raise invalid_request(error) from None


def _options(
    taps: str | Tap | Sequence[str | Tap],
    pool: str | Sequence[str] = Pool.TOKENS,
    dtype: str = "float32",
    scope: Scope | str = Scope.COMPLETION,
    expected_model_fingerprint: str = "",
    expected_tokenizer_fingerprint: str = "",
    priority: int = 0,
    run_id: str = "",
    reading: str = "",
) -> ActivationOptions:
    if reading != "" and (problem := name_problem(reading)):
        raise MessageError("reading", problem)
    try:
        scope = Scope(scope)
    except ValueError:
        raise MessageError("scope", f"{scope!r} is none of {', '.join(known.value for known in Scope)}") from None
    pools: dict[Pool, None] = {}
    for name in [pool] if isinstance(pool, str) else pool:
        try:
            pools[Pool(name)] = None
        except ValueError:
            raise MessageError("pool", f"{str(name)[:100]!r} is none of {', '.join(known.value for known in Pool)}") from None
    if not pools:
        raise MessageError("pool", f"at least one of {', '.join(known.value for known in Pool)} is needed")
    return ActivationOptions(
        taps=tuple(map(str, [taps] if isinstance(taps, (str, Tap)) else taps)),
        pools=tuple(pools),
        dtype=dtype,
        scope=scope,
        expected_model_fingerprint=expected_model_fingerprint,
        expected_tokenizer_fingerprint=expected_tokenizer_fingerprint,
        priority=priority,
        run_id=run_id,
        reading=reading,
    )


class ReadPlan:
    """Plan of one call of the client's method ``activations``, which reads a model's activations from a server: divides rollout groups into
    chunks, each of which is sent in one RPC.

    Args:
        template: the options of the request.
        server: description of the server, which says at which places in the model the server reads, and how much it sends in one response.
        bytes_per_call: limit on the bytes of activations in the response to one RPC; a single completion may have more.

    Raises:
        ServerError: the server gives no activations.
        InvalidRequestError: a tap (place in the model) is none of those that the server reads.
    """

    def __init__(self, template: activations_pb2.ReadActivationsRequest, server: ServerInfo, bytes_per_call: int) -> None:
        if bytes_per_call < 1:
            raise ValueError(f"bytes_per_call must be at least 1, got {bytes_per_call}")
        if not server.activation_taps:
            raise activations_off()
        self._template = template
        self._options = activation_options_from_request(template)
        self._taps = _matching(self._options.taps, server.activation_taps)
        self._hidden_size = server.model.hidden_size
        self._bytes = min(bytes_per_call, server.limits.max_activation_bytes)
        self._tokens = min(TOKENS_PER_CALL, server.limits.max_request_tokens)
        self._completions = min(COMPLETIONS_PER_CALL, server.limits.max_request_rollouts)
        self._versions = VersionsOfCall("call", "activations")

    def chunks(self, groups: Iterable[RolloutGroup]) -> Iterator[ReadChunk]:
        """Divides rollout groups into chunks, each the content of one RPC, and yields the chunks; reads the groups only as far as the
        caller asks for chunks.

        Raises:
            InvalidRequestError: a group cannot be sent; the error names the group's place.
        """
        chunk, size = self._new_chunk(), 0
        for index, group in enumerate(groups):
            message = self._message(group, index)
            prompt_tokens = _size(message.prompt)
            for position, completion in enumerate(message.completions):
                tokens, completions, values = self._cost(completion, prompt_tokens)
                new_prompt = 0 if index in chunk.prompts else prompt_tokens
                if chunk.missing and (
                    size + values > self._bytes
                    or chunk.tokens + new_prompt + tokens > self._tokens
                    or chunk.completions + completions > self._completions
                ):
                    yield chunk
                    chunk, size, new_prompt = self._new_chunk(), 0, prompt_tokens
                chunk.add(index, message.prompt, {(index, position): completion}, new_prompt + tokens, completions)
                size += values
        if chunk.missing:
            yield chunk

    def _new_chunk(self) -> ReadChunk:
        return ReadChunk(self._template, self._options, self._taps, self._hidden_size, self._versions)

    def _message(self, group: RolloutGroup, index: int) -> scoring_pb2.RolloutGroup:
        try:
            message = group_to_proto(group, f"groups[{index}]")
            if not message.completions:
                raise MessageError(f"groups[{index}].completions", "is empty; expected at least one")
        except MessageError as error:
            raise invalid_request(error) from None
        return message

    def _cost(self, completion: scoring_pb2.Completion, prompt_tokens: int) -> tuple[int, int, int]:
        """Returns the number of tokens of a completion with its follow-ups (token ids appended to the completion), the number of
        completions and follow-ups, and the bytes of their activations.
        """
        row_bytes = self._hidden_size * NUMBER_FORMATS[self._options.dtype].item.itemsize * len(self._taps)
        pools = [pool for pool in self._options.pools if pool is not Pool.TOKENS]
        tokens = completions = rows = 0
        for asked, path in _views(completion, ()):
            own = _size(asked)
            tokens, completions = tokens + own, completions + 1
            if not path:
                scope = self._options.scope
                own = (0 if scope is Scope.PROMPT else own) + (0 if scope is Scope.COMPLETION else prompt_tokens)
            rows += own * (Pool.TOKENS in self._options.pools) + (1 + len(asked.spans)) * len(pools)
        return tokens, completions, rows * row_bytes


def activations_off() -> ServerError:
    """Returns the exception for a server whose settings do not allow it to send activations."""
    return ServerError("the server gives no activations: its setting allow_activations names no taps", "UNIMPLEMENTED", "ACTIVATIONS_OFF")


def _matching(patterns: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of taps (places in the model) that match the patterns of a request, in the order of the patterns. Patterns
    are those of shells, such as ``resid_post.*``, and tell upper from lower case, as in the server.
    """
    found: dict[str, None] = {}
    for index, pattern in enumerate(patterns):
        meant = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        if not meant:
            raise invalid_request(
                MessageError(f"taps[{index}]", f"{pattern[:100]!r} is none of the taps that the server reads: {', '.join(known)[:1000]}")
            )
        found.update(dict.fromkeys(meant))
    if not found:
        raise invalid_request(MessageError("taps", f"at least one is needed; the server reads {', '.join(known)[:1000]}"))
    return tuple(found)


class ReadChunk(Chunk):
    """The completions that one RPC ``ReadActivations`` sends, until the activations of each have arrived once."""

    def __init__(
        self,
        template: activations_pb2.ReadActivationsRequest,
        options: ActivationOptions,
        taps: tuple[str, ...],
        hidden_size: int,
        versions: VersionsOfCall,
    ) -> None:
        super().__init__()
        self._template = template
        self._options = options
        self._taps = taps
        self._hidden_size = hidden_size
        self._versions = versions
        self._read: dict[Position, CompletionActivations] = {}
        self._now: _Assembly | None = None
        self._info: ActivationsInfo | None = None

    def request(self) -> activations_pb2.ReadActivationsRequest:
        """Returns a request message for those completions of an RPC whose activations have not arrived yet. Activations of a completion
        that had arrived in part are dropped.
        """
        request = activations_pb2.ReadActivationsRequest()
        request.CopyFrom(self._template)
        request.groups.extend(self._groups_to_send())
        self._now = self._info = None
        return request

    def accept(self, message: activations_pb2.ReadActivationsResponse) -> None:
        """Accepts one message of the response to the last message that ``request`` returned.

        Raises:
            ServerError: the message violates the protobuf contract, or does not match the request.
            MismatchError: the server's model or tokenizer is not the one that the request expects, or the activations are of another
                version of the reading than those that came before.
        """
        try:
            info = self._checked_info(message.info)
            for index, part in enumerate(message.parts):
                self._accept(part, info, f"parts[{index}]")
        except MessageError as error:
            raise malformed_answer(error) from None

    def results(self) -> Iterator[CompletionActivations]:
        """Yields the activations of all completions that one RPC sent, in the order of the completions, and keeps no reference to the
        activations.
        """
        for position in sorted(self._read):
            yield self._read.pop(position)

    def _checked_info(self, message: activations_pb2.ActivationsInfo) -> ActivationsInfo:
        info, options = activations_info_from_proto(message), self._options
        for name, expected, found in (
            ("model_fingerprint", options.expected_model_fingerprint, info.model_fingerprint),
            ("tokenizer_fingerprint", options.expected_tokenizer_fingerprint, info.tokenizer_fingerprint),
        ):
            if expected and found != expected:
                problem = f"the server runs {found}, the request expects {expected}"
                violation = FieldViolation(f"expected_{name}", problem)
                raise MismatchError(f"{violation.field}: {problem}", "FAILED_PRECONDITION", violations=(violation,))
        if not info.model_fingerprint:
            raise MessageError("info.model_fingerprint", "is empty: nobody could say of which model the activations are")
        for name, found_value, asked in (
            ("taps", set(info.taps), set(self._taps)),
            ("pools", set(info.pools), set(options.pools)),
            ("dtype", info.dtype, options.dtype),
        ):
            if found_value != asked:
                raise MessageError(f"info.{name}", f"is {getattr(info, name)}; {asked} was asked for")
        named = () if info.reading is None else (info.reading,)
        check_readings([options.reading] if options.reading else [], named, info.model_fingerprint, "info.reading", done="read")
        for reading in named:
            self._versions.check(reading)
        same = replace(info, usage=Usage())
        if self._info is not None and same != self._info:
            raise MessageError("info", "is another than in the call's first message")
        self._info = same
        return info

    def _accept(self, part: activations_pb2.ActivationPart, info: ActivationsInfo, path: str) -> None:
        if part.WhichOneof("part") == "begins":
            if self._now is None:
                self._now = self._begun(part.begins, info, path)
            self._now.begin(part.begins, f"{path}.begins")
        elif self._now is None:
            raise MessageError(path, "has rows before any completion has begun")
        else:
            self._now.add(part.rows, f"{path}.rows")
        if self._now.is_whole:
            self._read[self._now.position] = self._now.completion()
            del self.missing[self._now.position]
            self._now = None

    def _begun(self, begins: activations_pb2.CompletionRead, info: ActivationsInfo, path: str) -> _Assembly:
        try:
            position = self._sent[begins.group_index][begins.completion_index]
            asked = self.missing[position]
        except (IndexError, KeyError):
            where = f"groups[{begins.group_index}].completions[{begins.completion_index}]"
            raise MessageError(path, f"{where} was not asked for, or answered before") from None
        return _Assembly(position, asked, self.prompts[position[0]], self._options, info, self._hidden_size)


@dataclass(eq=False)
class _ViewRead:
    """A completion, or a follow-up (token ids appended to a completion), whose activations arrive from the server row by row.

    Attributes:
        begins: the server's message with which the completion or follow-up began.
        token_ids: tokens in scope, ``(T,)`` int32.
        selections: which tokens count, ``(1 + spans, T)`` bool: in the whole scope under the mask, then in each named span.
        arrays: the rows under each tap (place in the model) and pool (way of pooling tokens), ``(rows, hidden_size)`` float32, filled as
            rows arrive.
    """

    asked: scoring_pb2.Completion
    begins: activations_pb2.CompletionRead
    token_ids: NDArray[np.int32]
    selections: NDArray[np.bool_]
    arrays: dict[tuple[str, Pool], NDArray[np.float32]]


class _Assembly:
    """Assembler of the activations of one completion and its follow-ups (token ids appended to a completion) from the parts in which a
    server sends them.
    """

    def __init__(
        self,
        position: Position,
        asked: scoring_pb2.Completion,
        prompt: scoring_pb2.Prompt,
        options: ActivationOptions,
        info: ActivationsInfo,
        hidden_size: int,
    ) -> None:
        self.position = position
        self._prompt = prompt
        self._options = options
        self._info = info
        self._hidden_size = hidden_size
        self._to_come = deque(_views(asked, ()))
        self._views: dict[tuple[int, ...], _ViewRead] = {}
        self._last: _ViewRead | None = None
        self._rows: deque[tuple[str, Pool, int, int]] = deque()  # It holds what is to come of the last view: tap, pool, first row, end.

    @property
    def is_whole(self) -> bool:
        """Returns whether all rows of activations of the completion and of its follow-ups (token ids appended to a completion) have
        arrived.
        """
        return not self._to_come and not self._rows

    def begin(self, begins: activations_pb2.CompletionRead, path: str) -> None:
        """Begins to collect the activations of the completion, or of its next follow-up (token ids appended to the completion)."""
        if self._rows or not self._to_come:
            raise MessageError(path, "begins before the rows of the one before are there")
        asked, follow_up = self._to_come.popleft()
        if tuple(begins.follow_up) != follow_up:
            raise MessageError(f"{path}.follow_up", f"is {list(begins.follow_up)}; {list(follow_up)} was to come")
        if begins.id != asked.id:
            raise MessageError(f"{path}.id", f"is {begins.id[:100]!r}; {asked.id[:100]!r} was asked for")
        status = member_of(STATUSES, begins.status, f"{path}.status")
        token_ids = tensor_to_array(begins.token_ids, f"{path}.token_ids", (INT32,), rank=1)
        self._check_ids(asked, begins, token_ids, path, is_follow_up=bool(follow_up))
        selections = _selections(asked, len(token_ids), begins.prompt_tokens, f"{path}.token_ids")
        arrays: dict[tuple[str, Pool], NDArray[np.float32]] = {}
        if status is CompletionStatus.OK:
            for tap in self._info.taps:
                for pool in self._info.pools:
                    rows = len(token_ids) if pool is Pool.TOKENS else len(selections)
                    arrays[tap, pool] = np.empty((rows, self._hidden_size), np.float32)
                    if rows:
                        self._rows.append((tap, pool, 0, rows))
        self._last = self._views[follow_up] = _ViewRead(asked, begins, token_ids, selections, arrays)

    def add(self, rows: activations_pb2.ActivationRows, path: str) -> None:
        """Adds rows of activations, which have arrived from the server, to those of the completion or follow-up (token ids appended to a
        completion) that the server began last.
        """
        if not self._rows or self._last is None:
            raise MessageError(path, "has rows that were not asked for")
        tap, pool, first, end = self._rows.popleft()
        if (rows.tap, rows.pool, rows.first_row) != (tap, POOLS[pool], first):
            came = f"row {rows.first_row} of {rows.tap[:100]}, pool {rows.pool}"
            raise MessageError(path, f"begins at {came}; row {first} of {tap}, pool {POOLS[pool]}, was to come")
        numbers = rows_from_proto(rows, self._options.dtype, path)
        if numbers.shape[1] != self._hidden_size or not 0 < len(numbers) <= end - first:
            raise MessageError(path, f"has shape {numbers.shape}; at most {end - first} rows of {self._hidden_size} were to come")
        self._check_numbers(numbers, self._last.selections[first : first + len(numbers)], pool, path)
        self._last.arrays[tap, pool][first : first + len(numbers)] = numbers
        if first + len(numbers) < end:
            self._rows.appendleft((tap, pool, first + len(numbers), end))

    def completion(self) -> CompletionActivations:
        """Returns the activations of one completion, once all have arrived, with its follow-ups (token ids appended to a completion)."""
        return self._completion(())

    def _completion(self, path: tuple[int, ...]) -> CompletionActivations:
        view = self._views.pop(path)
        taps = self._info.taps if view.arrays else ()
        pools = [pool for pool in self._info.pools if pool is not Pool.TOKENS]
        return CompletionActivations(
            group_index=self.position[0],
            completion_index=self.position[1],
            id=view.begins.id,
            status=member_of(STATUSES, view.begins.status, "status"),
            token_ids=view.token_ids,
            selections=view.selections,
            spans=tuple(span.name for span in view.asked.spans),
            tokens={tap: view.arrays[tap, Pool.TOKENS] for tap in taps} if Pool.TOKENS in self._info.pools else {},
            pooled={tap: np.stack([view.arrays[tap, pool] for pool in pools], axis=1) for tap in taps} if pools else {},
            status_message=view.begins.status_message,
            inexact_ids=view.begins.inexact_ids,
            follow_ups=tuple(self._completion((*path, index)) for index in range(len(view.asked.follow_ups))),
            prompt_tokens=view.begins.prompt_tokens,
            info=self._info,
            reading=self._info.reading,
        )

    def _check_ids(
        self,
        asked: scoring_pb2.Completion,
        begins: activations_pb2.CompletionRead,
        token_ids: NDArray[np.int32],
        path: str,
        *,
        is_follow_up: bool,
    ) -> None:
        """Checks that the token ids that a server names in a response are those that the request sent; a prompt or completion sent as text
        is not checked.
        """
        scope, prompt_tokens = self._options.scope, begins.prompt_tokens
        if prompt_tokens > len(token_ids):
            raise MessageError(f"{path}.prompt_tokens", f"is {prompt_tokens}, of {len(token_ids)} tokens")
        parts: list[tuple[Any, NDArray[np.int32], bool]] = [
            (self._prompt, token_ids[:prompt_tokens], not is_follow_up and scope is not Scope.COMPLETION),
            (asked, token_ids[prompt_tokens:], is_follow_up or scope is not Scope.PROMPT),
        ]
        for sent, came, is_read in parts:
            if not is_read:
                expected: NDArray[Any] | None = np.zeros(0, np.int32)
            elif sent.WhichOneof("form") in ("text", "chat"):
                expected = None
            else:
                expected = tensor_to_array(sent.ids, f"{path}.token_ids", (sent.ids.dtype,), rank=1) if sent.HasField("ids") else came[:0]
            if expected is not None and not np.array_equal(expected, came):
                raise MessageError(f"{path}.token_ids", f"has {len(came)} ids that are not the {len(expected)} that were asked for")

    def _check_numbers(self, numbers: NDArray[np.float32], selections: NDArray[np.bool_], pool: Pool, path: str) -> None:
        finite = np.isfinite(numbers).all(axis=1)
        if pool is Pool.TOKENS:
            if not finite.all():
                raise MessageError(path, f"has a number that is not finite in row {int(np.argmin(finite))}, though the status is OK")
            return
        selected = selections.any(axis=1)
        absent = np.isnan(numbers).all(axis=1)
        if not np.where(selected, finite, absent).all():
            raise MessageError(path, "has numbers where no token counts, or none where tokens count")


def _views(completion: scoring_pb2.Completion, path: tuple[int, ...]) -> Iterator[tuple[scoring_pb2.Completion, tuple[int, ...]]]:
    """Yields a completion and then its follow-ups (token ids appended to a completion), each followed by its own follow-ups. Each comes
    with its path: the indices that lead from the completion to it, empty for the completion itself.
    """
    yield completion, path
    for index, follow_up in enumerate(completion.follow_ups):
        yield from _views(follow_up, (*path, index))


def _selections(asked: scoring_pb2.Completion, tokens: int, prompt_tokens: int, path: str) -> NDArray[np.bool_]:
    """Returns which of the ``T`` tokens of a completion count, ``(1 + spans, T)`` bool: in the whole scope (the tokens read) under the
    completion's mask, then in each of its named spans.
    """
    own = tokens - prompt_tokens
    mask = np.frombuffer(asked.mask.data, np.bool_) if asked.HasField("mask") else np.ones(own, np.bool_)
    if len(mask) != own or any(span.end > own for span in asked.spans):
        raise MessageError(path, f"has {own} tokens of the completion, which its mask and spans do not fit")
    whole = np.concatenate([np.ones(prompt_tokens, np.bool_), mask])
    selections = np.zeros((1 + len(asked.spans), tokens), np.bool_)
    selections[0] = whole
    for row, span in enumerate(asked.spans, 1):
        within = slice(prompt_tokens + span.start, prompt_tokens + span.end)
        selections[row, within] = whole[within]
    return selections


def _size(sent: scoring_pb2.Prompt | scoring_pb2.Completion) -> int:
    """Returns the number of token ids of a prompt or completion in a request; of one sent as text the number of bytes, which is at least
    the number of tokens.
    """
    match sent.WhichOneof("form"):
        case "ids":
            return sent.ids.shape[0]
        case "text":
            return len((sent.text.text if isinstance(sent, scoring_pb2.Prompt) else sent.text).encode())
        case "chat" if isinstance(sent, scoring_pb2.Prompt):
            return sum(len(message.content.encode()) for message in sent.chat.messages)
        case _:
            return 0
