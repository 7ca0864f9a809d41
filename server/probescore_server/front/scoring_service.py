"""Implements the gRPC service ``ScoringService``: checks requests, has the scheduler compute their rollouts, and builds the responses."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from typing import Any, Literal, TypeAlias, TypeVar

import grpc
import numpy as np
import structlog
from numpy.typing import NDArray

from probescore.reductions import Reduction
from probescore.types import (
    FROZEN,
    CompletionScores,
    GroupScores,
    Limits,
    Reading,
    RolloutGroup,
    Scope,
    ScoredProbe,
    ScoreResult,
    ScoringInfo,
    ServerInfo,
    Usage,
    WorkerInfo,
)
from probescore.v1 import probes_pb2, scoring_pb2, scoring_pb2_grpc
from probescore.wire import (
    MessageError,
    RequestOptions,
    groups_from_request,
    options_from_request,
    probes_to_proto,
    result_to_proto,
    server_info_to_proto,
    streamed_to_proto,
)
from probescore_server.activations import allowed_taps
from probescore_server.errors import InvalidRequest
from probescore_server.event_loop import (
    MAX_BYTES_CHECKED_ON_LOOP,
    MAX_BYTES_WRITTEN_ON_LOOP,
    MAX_ROLLOUTS_COUNTED_AT_ONCE,
    MAX_SCORES_ON_LOOP,
    off_the_loop,
)
from probescore_server.front.common_fields import check_fingerprints, check_run, deadline_of, job_of, served_info, texts_of
from probescore_server.front.metrics import Metrics
from probescore_server.front.request_counts import check_counts
from probescore_server.registry.readings import PinnedNames, ReadingRegistry
from probescore_server.registry.registry import ProbeRegistry
from probescore_server.rollouts import CheckedRollout, EngineInfo, PinnedReading, ResolvedOptions
from probescore_server.scheduling.call import Call, Delivery, FinishedRollout
from probescore_server.scheduling.scheduler import Scheduler
from probescore_server.settings import ServerSettings
from probescore_server.validation.calibrated_rollouts import CalibrationsOfProbes, OutsideRollouts, calibrations_with_conditions
from probescore_server.validation.options import check_readings_of_probes, resolve_options
from probescore_server.validation.rollouts import resolve_rollouts
from probescore_server.validation.texts import PendingText
from probescore_server.workers.handle import WorkerHandle
from probescore_server.workers.tokenising import encode

logger = structlog.get_logger(__name__)

# gRPC for Python slows down with larger messages.
MAX_STREAMED_BYTES = 1 << 20

# Checked options take half a megabyte each with a thousand probes, so that only a few are cached.
MAX_KNOWN_OPTIONS = 16
MAX_KNOWN_REDUCTIONS = 8

Result = TypeVar("Result")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(frozen=True)
class _CheckedRequest:
    """Value object with a scoring request that has passed every check.

    Attributes:
        rollouts: the rollouts, by group and then by completion.
        options: how the rollouts are scored.
        info: the model and probes that were served when the request's names of probes were resolved.
        probes: a description of each probe whose scores the response contains.
        readings: a description of each reading that the request names, as the name was resolved.
        outside: the rollouts that are unlike those on which thresholds of the probes were found; ``None`` = there is nothing to compare.
        request: the other fields of the request, such as its priority.
        seconds: the seconds that checking took.
    """

    rollouts: list[list[CheckedRollout]]
    options: ResolvedOptions
    info: EngineInfo
    probes: tuple[ScoredProbe, ...]
    readings: tuple[Reading, ...]
    outside: OutsideRollouts | None
    request: RequestOptions
    seconds: float


class ScoringServicer(scoring_pb2_grpc.ScoringServiceServicer):
    """Servicer of ``probescore.v1.ScoringService``. Its methods raise errors as ``CoreError``, which ``ErrorInterceptor`` turns into gRPC
    statuses.
    """

    def __init__(
        self,
        settings: ServerSettings,
        workers: Sequence[WorkerHandle],
        scheduler: Scheduler,
        registry: ProbeRegistry,
        readings: ReadingRegistry,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._workers = workers
        self._scheduler = scheduler
        self._registry = registry
        self._readings = readings
        self._metrics = metrics
        # Most calls repeat the options of earlier ones.
        self._known_options = functools.lru_cache(MAX_KNOWN_OPTIONS)(_resolve_options)

    def forget_options(self) -> None:
        """Forgets the cached options of earlier scoring requests. It must be called when other probes or readings are served, since the
        descriptions of the earlier ones would otherwise stay in memory. What names mean now is no part of the cache: options are looked up
        by what the names mean.
        """
        self._known_options.cache_clear()

    async def Score(self, request: scoring_pb2.ScoreRequest, context: Context) -> scoring_pb2.ScoreResponse:  # noqa: N802
        """Scores every completion of a request, and responds once all are scored."""
        with self._registry.using() as use, self._readings.pinning() as pin:
            asked = await self._check(request, use, pin)
            with self._submit(asked, pin, context) as call:
                deliveries = [self._counted(call, delivery, asked) async for delivery in call]
        finished = [one for delivery in deliveries for one in delivery.finished]
        usage = _usage(call, finished, sum(delivery.compute_seconds for delivery in deliveries))
        _after_the_answer(self._count_call, asked, usage, call.job)
        return await off_the_loop(_whole_answer, finished, asked, usage, small=_is_small(finished, asked))

    async def ScoreStream(  # noqa: N802
        self, request: scoring_pb2.ScoreStreamRequest, context: Context
    ) -> AsyncIterator[scoring_pb2.ScoreStreamResponse]:
        """Scores every completion of a request, and yields the scores in pieces, as batches finish."""
        total = Usage()
        with self._registry.using() as use, self._readings.pinning() as pin:
            asked = await self._check(request.request, use, pin)
            with self._submit(asked, pin, context) as call:
                async for delivery in call:
                    self._counted(call, delivery, asked)
                    for finished in await off_the_loop(_pieces, delivery, small=_is_small(delivery.finished, asked)):
                        usage = _usage(call, finished, delivery.compute_seconds)
                        yield await off_the_loop(_streamed_answer, finished, asked, usage, small=_is_small(finished, asked))
                    total = _usage(call, delivery.finished, delivery.compute_seconds, total)
        _after_the_answer(self._count_call, asked, total, call.job)

    async def GetServerInfo(  # noqa: N802
        self, request: scoring_pb2.GetServerInfoRequest, context: Context
    ) -> scoring_pb2.GetServerInfoResponse:
        """Returns the server's version, model, limits, workers and names of current and retired probes; a retired probe is served only by
        its full name, ``name@version``.
        """
        info, settings = served_info(self._registry), self._settings
        loaded = [worker.info or info for worker in self._workers]
        return server_info_to_proto(
            ServerInfo(
                server_version=version("probescore"),
                model=info.model,
                tokenizer_fingerprint=info.tokenizer_fingerprint,
                limits=Limits(**{limit.name: getattr(settings, limit.name) for limit in fields(Limits)}),
                workers=tuple(
                    WorkerInfo(worker.spec.device, engine.dtype, engine.execution_path, worker.ready, worker.restarts, worker.asleep)
                    for worker, engine in zip(self._workers, loaded, strict=True)
                ),
                probes=tuple(probe.key for probe in info.probes if probe.key not in info.retired),
                retired_probes=tuple(probe.key for probe in info.probes if probe.key in info.retired),
                activation_taps=tuple(map(str, allowed_taps(info, settings.allow_activations))),
                readings=self._readings.described(info),
            )
        )

    async def ListProbes(  # noqa: N802
        self, request: probes_pb2.ListProbesRequest, context: Context
    ) -> probes_pb2.ListProbesResponse:
        """Returns the loaded probes with their manifests, as the response to the RPC ``ListProbes``."""
        info = served_info(self._registry)
        return probes_to_proto(replace(probe, retired=probe.key in info.retired) for probe in info.probes)

    # -------------------------------------------------------------------------------------------------------------- a request

    async def _check(self, request: scoring_pb2.ScoreRequest, use: Callable[[Collection[str]], None], pin: PinnedNames) -> _CheckedRequest:
        """Checks a scoring request, tokenises its texts, and returns its checked rollouts, ready to be scored.

        Names of probes and readings are resolved to versions once, and stay so for this request; the function ``use`` is called with the
        resolved names of probes, and ``pin`` resolves those of readings.
        """
        started = time.monotonic()
        small = request.ByteSize() <= MAX_BYTES_CHECKED_ON_LOOP
        known = len(served_info(self._registry).probes)
        asked, groups, texts = await off_the_loop(_read_request, request, self._settings, known, small=small)
        await pin.resolve(asked.readings, served_info(self._registry))
        info = served_info(self._registry)
        check_fingerprints(info, asked.expected_model_fingerprint, asked.expected_tokenizer_fingerprint)
        # Clients choose reductions freely: the memory of the cache must not grow with their number.
        resolve = self._known_options if len(asked.reductions) <= MAX_KNOWN_REDUCTIONS else _resolve_options
        options, probes, calibrations = resolve(
            info,
            asked.probes,
            asked.reductions,
            asked.token_scores,
            asked.scope,
            asked.return_token_ids,
            asked.return_token_texts,
            pin.wanted,
        )
        check_readings_of_probes(info, options.probes, asked.readings)
        use(options.probes)
        encoded = await encode(self._workers, texts) if texts else {}
        rollouts = await off_the_loop(
            resolve_rollouts,
            groups,
            info,
            options,
            encoded=encoded,
            max_rollout_tokens=self._settings.max_rollout_tokens,
            max_request_tokens=self._settings.max_request_tokens,
            max_span_scores=self._settings.max_span_scores,
            max_request_values=self._settings.max_request_values,
            small=small,
        )
        outside = await off_the_loop(OutsideRollouts.of, rollouts, calibrations, options.scope, info.bos_token_id, small=small)
        return _CheckedRequest(rollouts, options, info, probes, pin.described, outside, asked, time.monotonic() - started)

    def _submit(self, asked: _CheckedRequest, pin: PinnedNames, context: Context) -> Call:
        deadline = deadline_of(context, self._scheduler.clock())
        call = self._scheduler.submit(asked.rollouts, job=job_of(context), priority=asked.request.priority, deadline=deadline)
        pin.call_if_lost(call.fail)
        return call

    def _counted(self, call: Call, delivery: Delivery, asked: _CheckedRequest) -> Delivery:
        _after_the_answer(self._count_delivery, call, delivery, asked)
        return delivery

    def _count_delivery(self, call: Call, delivery: Delivery, asked: _CheckedRequest) -> None:
        self._metrics.count_usage(_usage(call, delivery.finished, delivery.compute_seconds))
        self._metrics.readings.count_rollouts(asked.readings, len(delivery.finished))
        self._count_results(delivery.finished, asked)

    def _count_results(self, finished: Sequence[FinishedRollout], asked: _CheckedRequest) -> None:
        """Counts scored rollouts in the probes' metrics in small portions, so that other work on the event loop can run in between."""
        now, later = finished[:MAX_ROLLOUTS_COUNTED_AT_ONCE], finished[MAX_ROLLOUTS_COUNTED_AT_ONCE:]
        self._metrics.probes.count_results(asked.probes, asked.options.scope, [one.result for one in now])
        if asked.outside is not None:
            self._metrics.calibrations.count(asked.probes, asked.outside, _places(asked.outside, now))
        if later:
            _after_the_answer(self._count_results, later, asked)

    def _count_call(self, asked: _CheckedRequest, usage: Usage, job: str) -> None:
        self._metrics.count_stage("check", asked.seconds)
        self._metrics.count_stage("queue", usage.queue_seconds)
        self._metrics.count_stage("compute", usage.compute_seconds)
        self._metrics.probes.count_call(asked.probes)
        _log_scored(asked, usage, job)


def _after_the_answer(work: Callable[..., None], *args: object) -> None:
    """Schedules the function ``work`` to run soon on the event loop, so that an RPC's response is sent first. Metrics and logs, for which
    this is used, take as long as building the response.
    """
    asyncio.get_running_loop().call_soon(work, *args)


# ---------------------------------------------------------------------------------------------------------------------- reading


def _read_request(
    request: scoring_pb2.ScoreRequest, limits: ServerSettings, loaded_probes: int
) -> tuple[RequestOptions, list[RolloutGroup], list[PendingText]]:
    check_counts(request, limits, loaded_probes)
    try:
        asked = options_from_request(request)
        groups = groups_from_request(request)
    except MessageError as error:
        raise InvalidRequest(error.field, error.problem) from None
    check_run(asked.priority, asked.run_id)
    return asked, groups, texts_of(groups, limits)


def _resolve_options(
    info: EngineInfo,
    probes: tuple[str, ...],
    reductions: tuple[Reduction, ...],
    token_scores: Literal["all"] | tuple[str, ...],
    scope: Scope,
    return_token_ids: bool,
    return_token_texts: bool,
    readings: tuple[PinnedReading, ...],
) -> tuple[ResolvedOptions, tuple[ScoredProbe, ...], CalibrationsOfProbes]:
    """Returns the checked options of an RPC, a description of each probe whose scores the response contains, and the probes' calibrations
    (thresholds with a description of the data they were found on), with which the RPC's rollouts are compared. Thresholds are of the frozen
    model's scores alone.
    """
    options = resolve_options(
        info,
        probes=probes,
        reductions=reductions,
        token_scores=token_scores,
        scope=scope,
        return_token_ids=return_token_ids,
        return_token_texts=return_token_texts,
    )
    options = replace(options, readings=readings)
    is_frozen_read = not readings or any(reading.name == FROZEN for reading in readings)
    return options, info.scored_probes(options), calibrations_with_conditions(info, options) if is_frozen_read else ()


# ---------------------------------------------------------------------------------------------------------------------- writing


def _is_small(finished: Sequence[FinishedRollout], asked: _CheckedRequest) -> bool:
    if len(finished) * len(asked.options.probes) * asked.options.answers > MAX_SCORES_ON_LOOP:
        return False
    return sum(_bytes_of(one.result.scores) for one in finished) <= MAX_BYTES_WRITTEN_ON_LOOP


def _log_scored(asked: _CheckedRequest, usage: Usage, job: str) -> None:
    logger.info(
        "scored",
        job=job,
        run_id=asked.request.run_id,
        step=asked.request.step,
        readings=[reading.name for reading in asked.readings],
        groups=len(asked.rollouts),
        completions=sum(map(len, asked.rollouts)),
        tokens_computed=usage.tokens_computed,
        queue_seconds=round(usage.queue_seconds, 4),
        compute_seconds=round(usage.compute_seconds, 4),
    )


def _usage(call: Call, finished: Iterable[FinishedRollout], compute_seconds: float, before: Usage | None = None) -> Usage:
    usages = [one.result.usage for one in finished] + ([before] if before else [])
    return replace(
        Usage.total(usages),
        queue_seconds=call.queue_seconds or 0.0,
        compute_seconds=compute_seconds + (before.compute_seconds if before else 0.0),
    )


def _scoring_info(asked: _CheckedRequest, usage: Usage, finished: Sequence[FinishedRollout]) -> ScoringInfo:
    """Returns the description of the model and the probes that scored the completions of a response, given in the response's order."""
    outside = asked.outside
    probes = asked.probes if outside is None else outside.noted(asked.probes, _places(outside, finished))
    return ScoringInfo(asked.info.model.fingerprint, asked.info.tokenizer_fingerprint, probes, usage, asked.readings)


def _places(outside: OutsideRollouts, finished: Sequence[FinishedRollout]) -> NDArray[np.int64]:
    """Returns the index of each of ``n`` completions among the rollouts of its request, as an array ``(n,)``; -1 for one without scores."""
    places = outside.places([(one.group, one.completion) for one in finished])
    return np.where([bool(one.result.scores.scores) for one in finished], places, -1)


def _whole_answer(finished: Iterable[FinishedRollout], asked: _CheckedRequest, usage: Usage) -> scoring_pb2.ScoreResponse:
    in_order = sorted(finished, key=lambda one: (one.group, one.completion))
    groups: dict[int, list[CompletionScores]] = {}
    for one in in_order:
        groups.setdefault(one.group, []).append(one.result.scores)
    return result_to_proto(
        ScoreResult(tuple(GroupScores(tuple(scores)) for scores in groups.values()), _scoring_info(asked, usage, in_order))
    )


def _streamed_answer(finished: Sequence[FinishedRollout], asked: _CheckedRequest, usage: Usage) -> scoring_pb2.ScoreStreamResponse:
    answer = [(one.group, one.completion, one.result.scores) for one in finished]
    return streamed_to_proto(answer, _scoring_info(asked, usage, finished))


def _pieces(delivery: Delivery) -> list[list[FinishedRollout]]:
    """Splits the results of a delivery (rollouts of one call that have finished) into lists. The results of one list fit into one streamed
    message, with at most ``MAX_STREAMED_BYTES`` of arrays and texts.

    The result of a single completion is never split, however large it is.
    """
    pieces: list[list[FinishedRollout]] = []
    piece: list[FinishedRollout] = []
    size = 0
    for one in delivery.finished:
        bytes_of_one = _bytes_of(one.result.scores)
        if piece and size + bytes_of_one > MAX_STREAMED_BYTES:
            pieces.append(piece)
            piece, size = [], 0
        piece.append(one)
        size += bytes_of_one
    return [*pieces, piece] if piece else pieces


def _bytes_of(scores: CompletionScores) -> int:
    arrays: list[NDArray[Any] | None] = [scores.prompt_ids, scores.completion_ids]
    for of_reading in (scores.scores, *(own.scores for own in scores.readings.values())):
        for probe in of_reading.values():
            arrays += [probe.reduced, probe.tokens]
    texts = (*(scores.prompt_texts or ()), *(scores.completion_texts or ()))
    own = sum(array.nbytes for array in arrays if array is not None) + sum(len(text.encode()) for text in texts)
    return own + sum(map(_bytes_of, scores.follow_ups))
