"""A scripted server: real gRPC on a real socket, whose answers a test writes down. It stands for the wire, not for the product's server."""

from __future__ import annotations

import asyncio
import fnmatch
import sys
import threading
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import numpy as np
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from probescore import (
    AsyncProbeClient,
    Chat,
    CompletionActivations,
    CompletionScores,
    CompletionStatus,
    GroupScores,
    LoadedReading,
    OutputPer,
    Pool,
    ProbeScores,
    Reading,
    ReadingKind,
    ReadingScores,
    Reduction,
    RolloutGroup,
    Scope,
    ScoredProbe,
    ScoreResult,
    ScoreUnit,
    ScoringInfo,
    StreamedCompletion,
    Text,
    Usage,
    reduce_scores,
)
from probescore.types import FROZEN, score_keys
from probescore.v1 import activations_pb2, activations_pb2_grpc, admin_pb2, admin_pb2_grpc, probes_pb2, scoring_pb2, scoring_pb2_grpc
from probescore.wire import (
    RequestOptions,
    activation_options_from_request,
    activations_info_to_proto,
    begin_to_proto,
    groups_from_request,
    loaded_reading_to_proto,
    options_from_request,
    reading_to_proto,
    result_to_proto,
    rows_to_proto,
    streamed_to_proto,
)
from probescore.wire.number_formats import NUMBER_FORMATS

SUM, PAIR, POOLED, FOLLOWED = PROBES = (
    ScoredProbe(
        name="sum",
        version="1",
        graph_sha256="sha256:graph",
        manifest_sha256="sha256:manifest",
        unit=ScoreUnit.VALUE,
        output_per=OutputPer.TOKEN,
        labels=("sum",),
        reductions=(Reduction.parse("sum"),),
    ),
    ScoredProbe(
        name="pair",
        version="2",
        graph_sha256="sha256:graph-of-pair",
        manifest_sha256="sha256:manifest-of-pair",
        unit=ScoreUnit.LOGIT,
        output_per=OutputPer.TOKEN,
        labels=("first", "second"),
        reductions=(Reduction.parse("max"),),
        exclude_special_tokens=True,
    ),
    ScoredProbe(
        name="pooled",
        version="1",
        graph_sha256="sha256:graph-of-pooled",
        manifest_sha256="sha256:manifest-of-pooled",
        unit=ScoreUnit.PROBABILITY,
        output_per=OutputPer.ROLLOUT,
        labels=("pooled",),
        reductions=(),
    ),
    ScoredProbe(
        name="followed",
        version="1",
        graph_sha256="sha256:graph-of-followed",
        manifest_sha256="sha256:manifest-of-followed",
        unit=ScoreUnit.VALUE,
        output_per=OutputPer.TOKEN,
        labels=("followed",),
        reductions=(Reduction.parse("mean"),),
        follow_up_tokens=3,
    ),
)
"""What the scripted server has: sums of ids, two labels without special tokens, one that pools, one that appends three tokens itself."""

SPECIAL_ID = 7
"""The one special token of the scripted server's tokenizer."""

INFO = ScoringInfo(model_fingerprint="sha256:model", tokenizer_fingerprint="sha256:tokenizer", probes=(SUM,))


def ids_of(tokens: Any) -> Any:
    """Ids as they are; of a text, the code points of its characters."""
    if isinstance(tokens, Text):
        tokens = tokens.text
    if isinstance(tokens, Chat):
        tokens = "".join(message.content for message in tokens.messages)
    return np.array([ord(character) for character in tokens] if isinstance(tokens, str) else tokens, np.int32)


def info_of(options: RequestOptions) -> ScoringInfo:
    """What the answer to a request with these options says of itself."""
    asked = options.probes or ("sum",)
    applied = [probe for name in asked for probe in PROBES if name in (probe.name, f"{probe.name}@{probe.version}")]
    chosen = [
        replace(probe, reductions=options.reductions) if options.reductions and probe.output_per is OutputPer.TOKEN else probe
        for probe in applied
    ]
    return replace(INFO, probes=tuple(chosen), readings=tuple(reading(name) for name in options.readings))


def reading(name: str, version: str = "1", step: int | None = None) -> Reading:
    """What a scripted server says of a reading: its id is that of its files, or the model's."""
    if name == FROZEN:
        return Reading(FROZEN, INFO.model_fingerprint, ReadingKind.FROZEN, None, INFO.model_fingerprint, golden_verified=True)
    return Reading(
        name, f"sha256:{version}", ReadingKind.ADAPTER, step, INFO.model_fingerprint, golden_verified=False, changed_layers=(0, 3)
    )


def on_readings(completion: CompletionScores, names: Sequence[str]) -> CompletionScores:
    """The scores of a completion with those on other readings, whose numbers are ten times as large; frozen's only if it is asked for."""
    if not names:
        return completion
    others = {
        name: ReadingScores(
            completion.status,
            {
                key: ProbeScores(scores.reduced * 10, None if scores.tokens is None else scores.tokens * 10)
                for key, scores in completion.scores.items()
            },
        )
        for name in names
        if name != FROZEN
    }
    follow_ups = tuple(on_readings(each, names) for each in completion.follow_ups)
    scores = completion.scores if FROZEN in names else {}
    return replace(completion, scores=scores, readings=others, follow_ups=follow_ups)


def scored(
    completion: Any, group: RolloutGroup, options: RequestOptions, *, follow_up: bool = False, inexact: bool = False
) -> CompletionScores:
    """The scores of one completion, worked out in the plainest way: a token's score is its id, the second label's twice that."""
    ids, prompt = ids_of(completion.tokens), ids_of(group.prompt)
    inexact = inexact or isinstance(completion.tokens, str)
    scope = Scope.COMPLETION if follow_up else options.scope
    before = prompt if scope is not Scope.COMPLETION else prompt[:0]
    own = ids if scope is not Scope.PROMPT else ids[:0]
    mask = np.ones(len(own), bool) if completion.mask is None else np.asarray(completion.mask, bool)
    whole = np.concatenate([np.ones(len(before), bool), mask])
    selections = [whole]
    for span in completion.spans:
        within = np.zeros_like(whole)
        within[len(before) + span.start : len(before) + span.end] = True
        selections.append(whole & within)
    scores = {}
    info = info_of(options)
    for key, probe in zip(score_keys(info.probes), info.probes, strict=True):
        read, chosen = np.concatenate([before, own]), selections
        if probe.follow_up_tokens:
            read = np.arange(probe.follow_up_tokens)
            chosen = [np.ones(len(read), bool), *(np.zeros(len(read), bool) for _ in completion.spans)]
        if probe.exclude_special_tokens:
            chosen = [selection & (read != SPECIAL_ID) for selection in chosen]
        per_token = np.stack([read * (1 + label) for label in range(len(probe.labels))], axis=1).astype(np.float32)
        reductions = probe.reductions or (Reduction.parse("max"),)
        reduced = np.stack([np.stack([reduce_scores(per_token[selection], each) for each in reductions]) for selection in chosen])
        names = (probe.name, f"{probe.name}@{probe.version}")
        wanted = probe.output_per is OutputPer.TOKEN and (
            options.token_scores == "all" or any(name in options.token_scores for name in names)
        )
        scores[key] = ProbeScores(reduced, per_token if wanted else None)
    return CompletionScores(
        completion.id,
        CompletionStatus.OK,
        scores,
        prompt_ids=prompt if options.return_token_ids and not follow_up else None,
        completion_ids=ids if options.return_token_ids else None,
        inexact_ids=inexact,
        follow_ups=tuple(scored(each, group, options, follow_up=True, inexact=inexact) for each in completion.follow_ups),
        prompt_texts=tuple(map(str, prompt)) if options.return_token_texts and not follow_up else None,
        completion_texts=tuple(map(str, ids)) if options.return_token_texts else None,
    )


def scored_groups(request: scoring_pb2.ScoreRequest) -> list[tuple[CompletionScores, ...]]:
    options = options_from_request(request)
    return [
        tuple(
            on_readings(scored(completion, group, options, inexact=isinstance(group.prompt, (Text, Chat))), options.readings)
            for completion in group.completions
        )
        for group in groups_from_request(request)
    ]


def answer(request: scoring_pb2.ScoreRequest) -> scoring_pb2.ScoreResponse:
    return result_to_proto(ScoreResult(tuple(map(GroupScores, scored_groups(request))), info_of(options_from_request(request))))


def answer_in_pieces(request: scoring_pb2.ScoreRequest) -> Iterator[scoring_pb2.ScoreStreamResponse]:
    """One message per completion, the last one first."""
    info = info_of(options_from_request(request))
    for group_index, group in reversed(list(enumerate(scored_groups(request)))):
        for completion_index, completion in reversed(list(enumerate(group))):
            yield streamed_to_proto([(group_index, completion_index, completion)], info)


@dataclass(eq=False)
class Refusal(Exception):
    """A status to fail a call with."""

    code: grpc.StatusCode
    message: str = "refused"
    details: tuple[Message, ...] = ()
    raw_details: bytes | None = None

    def abort(self, context: grpc.ServicerContext) -> None:
        packed = []
        for detail in self.details:
            entry = any_pb2.Any()
            entry.Pack(detail)
            packed.append(entry)
        raw = self.raw_details
        if packed:
            raw = status_pb2.Status(code=self.code.value[0], message=self.message, details=packed).SerializeToString()
        trailing: list[tuple[str, str | bytes]] = [] if raw is None else [("grpc-status-details-bin", raw)]
        for detail in self.details:  # as the product's server does, for gRPC's own retries
            if isinstance(detail, error_details_pb2.RetryInfo):
                trailing.append(("grpc-retry-pushback-ms", str(detail.retry_delay.ToMilliseconds())))
        if trailing:
            context.set_trailing_metadata(tuple(trailing))
        context.abort(self.code, self.message)


def error_info(reason: str, domain: str = "probescore") -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=domain)


def retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    return error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9)))


def unavailable(retry_seconds: float = 0.01) -> Refusal:
    details = (error_info("WORKER_UNAVAILABLE"), retry_info(retry_seconds))
    return Refusal(grpc.StatusCode.UNAVAILABLE, "the worker is starting again", details)


def queue_full(retry_seconds: float = 0.01) -> Refusal:
    return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "5 tokens are waiting", (error_info("QUEUE_FULL"), retry_info(retry_seconds)))


@dataclass
class Service(
    scoring_pb2_grpc.ScoringServiceServicer, activations_pb2_grpc.ActivationServiceServicer, admin_pb2_grpc.ProbeAdminServiceServicer
):
    """Answers, or does what the next entry of its script says: raises a Refusal, or calls a function with the request.

    Attributes:
        script: what to do on the next calls, in their order; afterwards every call is answered.
        requests: what came.
        metadata: what came with each of them.
        admin: whether it takes sleep and wake.
    """

    script: list[Refusal | Callable[[Any], Any]] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    admin: bool = True
    lock: Any = field(default_factory=threading.Lock)

    def _act(self, request: Any, context: grpc.ServicerContext, otherwise: Callable[[Any], Any]) -> Any:
        with self.lock:
            self.requests.append(request)
            self.metadata.append({entry.key: entry.value for entry in context.invocation_metadata()})
            act = self.script.pop(0) if self.script else otherwise
        if isinstance(act, Refusal):
            act.abort(context)
        return act(request)

    def Score(self, request: Any, context: Any) -> Any:
        return self._act(request, context, answer)

    def ScoreStream(self, request: Any, context: Any) -> Any:
        try:
            yield from self._act(request.request, context, answer_in_pieces)
        except Refusal as refusal:
            refusal.abort(context)

    def ReadActivations(self, request: Any, context: Any) -> Any:
        try:
            yield from self._act(request, context, read_parts)
        except Refusal as refusal:
            refusal.abort(context)

    def GetServerInfo(self, request: Any, context: Any) -> Any:
        return self._act(request, context, lambda _: scoring_pb2.GetServerInfoResponse(server_version="9", probes=["sum@1"]))

    def ListProbes(self, request: Any, context: Any) -> Any:
        return self._act(request, context, lambda _: probes_pb2.ListProbesResponse())

    def Sleep(self, request: Any, context: Any) -> Any:
        moved = admin_pb2.Transfer(device="cuda:0", seconds=1.5, weight_bytes=8_000, device_bytes=9_000)
        return self._act(request, context, lambda _: admin_pb2.SleepResponse(transfers=[moved]))

    def Wake(self, request: Any, context: Any) -> Any:
        return self._act(request, context, lambda _: admin_pb2.WakeResponse(transfers=[admin_pb2.Transfer(device="cuda:0")]))


@dataclass
class ReadingService(Service):
    """A scripted server that takes readings: each directory has one version, and a name means what was loaded last.

    Attributes:
        directories: a dictionary from the paths that exist to the versions of what they hold.
        named: a dictionary from names to what they mean.
        refusals: a dictionary from paths to what loading them fails with.
        held: names that cannot be replaced, since calls that never end read what they mean.
    """

    directories: dict[str, str] = field(default_factory=dict)
    named: dict[str, Reading] = field(default_factory=dict)
    refusals: dict[str, Refusal] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)

    def asked(self, kind: type[Message]) -> list[Any]:
        return [request for request in self.requests if isinstance(request, kind)]

    def Score(self, request: Any, context: Any) -> Any:
        return self._act(request, context, lambda asked: self._named_in(answer(asked)))

    def ScoreStream(self, request: Any, context: Any) -> Any:
        try:
            yield from map(self._named_in, self._act(request.request, context, answer_in_pieces))
        except Refusal as refusal:
            refusal.abort(context)

    def _named_in(self, message: Any) -> Any:
        for place, each in enumerate(message.info.readings):
            if each.name != FROZEN:
                message.info.readings[place].CopyFrom(reading_to_proto(self.named[each.name]))
        return message

    def GetServerInfo(self, request: Any, context: Any) -> Any:
        def told(_: Any) -> Any:
            readings = [reading_to_proto(each) for each in (reading(FROZEN), *self.named.values())]
            return scoring_pb2.GetServerInfoResponse(server_version="9", probes=["sum@1"], readings=readings)

        return self._act(request, context, told)

    def LoadReading(self, request: Any, context: Any) -> Any:
        def load(asked: Any) -> Any:
            if asked.name in self.held:
                refused("READING_IN_USE", grpc.StatusCode.FAILED_PRECONDITION).abort(context)
            replaced = self.named.pop(asked.name, None) if asked.in_place else self.named.get(asked.name)
            if asked.path in self.refusals:
                self.refusals[asked.path].abort(context)
            if asked.path not in self.directories:
                refused("READING_REFUSED", grpc.StatusCode.INVALID_ARGUMENT).abort(context)
            loaded = reading(asked.name, self.directories[asked.path], asked.step if asked.HasField("step") else None)
            if asked.expected_id not in ("", loaded.id):
                refused("READING_MISMATCH", grpc.StatusCode.FAILED_PRECONDITION).abort(context)
            self.named[asked.name] = loaded
            return loaded_reading_to_proto(LoadedReading(loaded, replaced, {"sum@1": 0.5}, 100))

        return self._act(request, context, load)

    def UnloadReading(self, request: Any, context: Any) -> Any:
        def unload(asked: Any) -> Any:
            if asked.name not in self.named:
                refused("UNKNOWN_READING", grpc.StatusCode.INVALID_ARGUMENT).abort(context)
            return admin_pb2.UnloadReadingResponse(removed=reading_to_proto(self.named.pop(asked.name)))

        return self._act(request, context, unload)


def refused(reason: str, code: grpc.StatusCode) -> Refusal:
    return Refusal(code, f"refused: {reason}", (error_info(reason),))


TAPS = ("mlp_out.0", "resid_post.1")
WIDTH = 3


def activations_of(ids: Any, tap: int) -> Any:
    """The activations of the scripted server, ``(T, WIDTH)``, in the plainest way: of a token its id, times the feature, plus the tap."""
    return (np.asarray(ids, np.float32)[:, None] * np.arange(1, 1 + WIDTH) + tap).astype(np.float32)


def read_views(completion: Any, group: RolloutGroup, scope: Scope, path: tuple[int, ...] = (), *, inexact: bool = False) -> Iterator[Any]:
    """A completion and its follow-ups, each with its path, the ids of its prompt that are in scope, its own, and what is selected."""
    ids, prompt = ids_of(completion.tokens), ids_of(group.prompt)
    inexact = inexact or isinstance(completion.tokens, str)
    before = prompt if scope is not Scope.COMPLETION and not path else prompt[:0]
    own = ids if scope is not Scope.PROMPT or path else ids[:0]
    mask = np.ones(len(own), bool) if completion.mask is None else np.asarray(completion.mask, bool)
    selections = [np.concatenate([np.ones(len(before), bool), mask])]
    for span in completion.spans:
        within = np.zeros_like(selections[0])
        within[len(before) + span.start : len(before) + span.end] = True
        selections.append(within & selections[0])
    yield path, completion, before, own, selections, inexact
    for index, follow_up in enumerate(completion.follow_ups):
        yield from read_views(follow_up, group, scope, (*path, index), inexact=inexact)


def pooled(rows: Any, selection: Any, pool: Pool) -> Any:
    """One row, NaN if nothing is selected."""
    chosen = rows[selection]
    if len(chosen) == 0:
        return np.full(WIDTH, np.nan, np.float32)
    return {Pool.MEAN: chosen.mean(axis=0), Pool.LAST: chosen[-1], Pool.MAX: chosen.max(axis=0)}[pool].astype(np.float32)


def read_parts(request: activations_pb2.ReadActivationsRequest) -> Iterator[activations_pb2.ReadActivationsResponse]:
    """One message per part and row, the last completion first."""
    options = activation_options_from_request(request)
    taps = [tap for tap in TAPS if any(fnmatch.fnmatchcase(tap, pattern) for pattern in options.taps)]
    info = activations_info_to_proto("sha256:model", "sha256:tokenizer", taps, options.pools, options.dtype, Usage())

    def message(part: activations_pb2.ActivationPart) -> activations_pb2.ReadActivationsResponse:
        return activations_pb2.ReadActivationsResponse(parts=[part], info=info)

    groups = groups_from_request(request)
    places = [(index, place) for index, group in enumerate(groups) for place in range(len(group.completions))]
    for index, place in reversed(places):
        group = groups[index]
        inexact = isinstance(group.prompt, (Text, Chat))
        for path, completion, before, own, selections, in_text in read_views(
            group.completions[place], group, options.scope, inexact=inexact
        ):
            told = CompletionScores(completion.id, CompletionStatus.OK, {}, prompt_ids=before, completion_ids=own, inexact_ids=in_text)
            yield message(begin_to_proto(index, place, path, told))
            for number, tap in enumerate(taps):
                rows = activations_of(np.concatenate([before, own]), number)
                for pool in options.pools:
                    sent = rows if pool is Pool.TOKENS else np.stack([pooled(rows, selection, pool) for selection in selections])
                    stored = NUMBER_FORMATS[options.dtype].encode(sent)
                    for first in range(len(stored)):
                        yield message(rows_to_proto(tap, pool, first, stored[first : first + 1], options.dtype))


def reading_server(_: Any = None) -> scoring_pb2.GetServerInfoResponse:
    """What a server that gives activations says of itself."""
    limits = scoring_pb2.Limits(max_activation_bytes=1 << 20, max_request_tokens=1000, max_request_rollouts=100)
    return scoring_pb2.GetServerInfoResponse(model=scoring_pb2.ModelInfo(hidden_size=WIDTH), activation_taps=TAPS, limits=limits)


@contextmanager
def serving(service: Service, address: str = "127.0.0.1:0", **options: int) -> Iterator[str]:
    """Serves until the block ends, then drops what is under way; gives the address."""
    server = grpc.server(
        ThreadPoolExecutor(32), options=[("grpc.so_reuseport", 0), *((f"grpc.{key}", value) for key, value in options.items())]
    )
    scoring_pb2_grpc.add_ScoringServiceServicer_to_server(service, server)
    activations_pb2_grpc.add_ActivationServiceServicer_to_server(service, server)
    if service.admin:
        admin_pb2_grpc.add_ProbeAdminServiceServicer_to_server(service, server)
    port = server.add_insecure_port(address)
    server.start()
    try:
        yield address if address.startswith("unix:") else f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


class BlockingAsyncClient:
    """An ``AsyncProbeClient`` driven from outside its loop, so that one test can be run on both clients."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.client = AsyncProbeClient(*args, **options)
        self.loop = asyncio.new_event_loop()

    def __enter__(self) -> BlockingAsyncClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.run_until_complete(self.client.close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **options: self.loop.run_until_complete(getattr(self.client, name)(*args, **options))

    @contextmanager
    def awake(self, **options: Any) -> Iterator[None]:
        block = self.client.awake(**options)
        self.loop.run_until_complete(block.__aenter__())
        try:
            yield
        finally:
            self.loop.run_until_complete(block.__aexit__(*sys.exc_info()))

    def score_stream(self, groups: Iterable[RolloutGroup] | AsyncIterable[RolloutGroup], **options: Any) -> Iterator[StreamedCompletion]:
        stream = self.client.score_stream(groups, **options)
        try:
            while (completion := self.loop.run_until_complete(anext(stream, None))) is not None:
                yield completion
        finally:
            self.loop.run_until_complete(stream.aclose())

    def activations(self, *args: Any, **options: Any) -> Iterator[CompletionActivations]:
        read = self.client.activations(*args, **options)  # at once, as a call's arguments are checked

        def each() -> Iterator[CompletionActivations]:
            try:
                while (completion := self.loop.run_until_complete(anext(read, None))) is not None:
                    yield completion
            finally:
                self.loop.run_until_complete(read.aclose())

        return each()


def group(*completions: Sequence[int], prompt: Sequence[int] = (1, 2)) -> RolloutGroup:
    return RolloutGroup(list(prompt), [list(completion) for completion in completions])
