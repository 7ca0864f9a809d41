"""Implements the gRPC service ``ActivationService``, which streams a language model's activations: checks requests, has the scheduler read
activations, and sends them in pieces.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import grpc
import structlog

from probescore.types import CompletionScores, Reading, RolloutGroup, Usage
from probescore.v1 import activations_pb2, activations_pb2_grpc
from probescore.wire import (
    ActivationOptions,
    MessageError,
    activation_options_from_request,
    activations_info_to_proto,
    begin_to_proto,
    groups_from_request,
    rows_to_proto,
)
from probescore.wire.number_formats import NUMBER_FORMATS
from probescore_server.activations import allowed_taps, resolve_reads
from probescore_server.errors import InvalidRequest, LimitExceeded
from probescore_server.event_loop import MAX_BYTES_CHECKED_ON_LOOP, MAX_BYTES_WRITTEN_ON_LOOP, off_the_loop
from probescore_server.front.calls_under_way import CallsUnderWay
from probescore_server.front.common_fields import check_fingerprints, check_run, deadline_of, job_of, served_info, texts_of
from probescore_server.front.metrics import Metrics
from probescore_server.front.request_counts import check_rollout_counts
from probescore_server.registry.readings import PinnedNames, ReadingRegistry
from probescore_server.registry.registry import ProbeRegistry
from probescore_server.request_cost import RequestCost
from probescore_server.rollouts import ActivationReads, CheckedRollout, EngineInfo, ResolvedOptions
from probescore_server.scheduling.call import Delivery, FinishedRollout
from probescore_server.scheduling.scheduler import Scheduler
from probescore_server.settings import ServerSettings
from probescore_server.validation.rollouts import resolve_rollouts
from probescore_server.validation.texts import PendingText
from probescore_server.workers.handle import WorkerHandle
from probescore_server.workers.tokenising import encode

logger = structlog.get_logger(__name__)

ACTIVATION_SERVICE: str = activations_pb2.DESCRIPTOR.services_by_name["ActivationService"].full_name

# gRPC for Python slows down with larger messages.
MAX_STREAMED_BYTES = 1 << 20

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(frozen=True)
class _CheckedRead:
    """Value object with a request for activations that has passed every check.

    Attributes:
        rollouts: the rollouts, by group and then by completion.
        reads: the activations that are read.
        reading: a description of the reading that the request names, as the name was resolved; ``None`` = it names none.
        request: the other fields of the request, such as its priority.
        seconds: the seconds that checking took.
    """

    rollouts: list[list[CheckedRollout]]
    reads: ActivationReads
    reading: Reading | None
    request: ActivationOptions
    seconds: float

    @property
    def activation_bytes(self) -> int:
        return sum(rollout.activation_bytes for group in self.rollouts for rollout in group)


class ActivationServicer(activations_pb2_grpc.ActivationServiceServicer):
    """Servicer of ``probescore.v1.ActivationService``. Its method raises errors as ``CoreError``, which ``ErrorInterceptor`` turns into
    gRPC statuses.

    What the server holds of a call's activations is bounded: batches of the call wait while ``MAX_ACTIVATION_BYTES`` of the module
    ``scheduling.queue`` are unread, and the answers of all calls together are admitted up to ``max_activation_bytes_in_flight``.
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
        limit = "max_activation_bytes_in_flight"
        self._answers = CallsUnderWay(settings.max_calls, getattr(settings, limit), unit="bytes of activations", limit=limit)

    async def ReadActivations(  # noqa: N802
        self, request: activations_pb2.ReadActivationsRequest, context: Context
    ) -> AsyncIterator[activations_pb2.ReadActivationsResponse]:
        """Handles the RPC ``ReadActivations``: reads activations of every completion of a request, and yields them in pieces, as batches
        finish.
        """
        total, compute_seconds = Usage(), 0.0
        with self._readings.pinning() as pin:
            info, asked = await self._check(request, pin)
            deadline = deadline_of(context, self._scheduler.clock())
            with (
                self._answers.call(asked.activation_bytes),
                self._scheduler.submit(asked.rollouts, job=job_of(context), priority=asked.request.priority, deadline=deadline) as call,
            ):
                pin.call_if_lost(call.fail)
                async for delivery in call:
                    usage = Usage.total(one.result.usage for one in delivery.finished)
                    self._metrics.count_usage(usage)
                    total, compute_seconds = Usage.total([total, usage]), compute_seconds + delivery.compute_seconds
                    small = delivery.activation_bytes <= MAX_BYTES_WRITTEN_ON_LOOP
                    messages = _messages(delivery, asked, info, call.queue_seconds or 0.0)
                    # A message is made only once the one before is sent: a reader that is slow holds up its own call and nothing else.
                    while (message := await off_the_loop(next, messages, None, small=small)) is not None:
                        yield message
                    self._metrics.activation_bytes.inc(delivery.activation_bytes)
        self._metrics.count_stage("check", asked.seconds)
        self._metrics.count_stage("queue", call.queue_seconds or 0.0)
        self._metrics.count_stage("compute", compute_seconds)
        logger.info(
            "activations read",
            job=call.job,
            run_id=asked.request.run_id,
            reading=asked.request.reading,
            completions=sum(map(len, asked.rollouts)),
            taps=len(asked.reads.taps),
            bytes=asked.activation_bytes,
            tokens_computed=total.tokens_computed,
            compute_seconds=round(compute_seconds, 4),
        )

    # -------------------------------------------------------------------------------------------------------------- a request

    async def _check(self, request: activations_pb2.ReadActivationsRequest, pin: PinnedNames) -> tuple[EngineInfo, _CheckedRead]:
        """Checks a request for activations, tokenises its texts, and returns its checked rollouts with the activations to read of them, and
        the model and probes that are served to it. The name of a reading is resolved to a version once, by ``pin``.
        """
        started = time.monotonic()
        small = request.ByteSize() <= MAX_BYTES_CHECKED_ON_LOOP
        known = allowed_taps(served_info(self._registry), self._settings.allow_activations)
        asked, groups, texts = await off_the_loop(_read_request, request, self._settings, len(known), small=small)
        if asked.reading:
            await pin.resolve([asked.reading], served_info(self._registry), "reading")
        info = served_info(self._registry)
        known = allowed_taps(info, self._settings.allow_activations)
        check_fingerprints(info, asked.expected_model_fingerprint, asked.expected_tokenizer_fingerprint)
        whose = "the taps that this server was started for (its setting allow_activations)"
        reads = resolve_reads(asked.taps, asked.pools, known, whose=whose, dtype=asked.dtype)
        encoded = await encode(self._workers, texts) if texts else {}
        options = ResolvedOptions(probes=(), scope=asked.scope, activations=reads, readings=pin.wanted)
        rollouts = await off_the_loop(_check_rollouts, groups, info, options, encoded, self._settings, small=small)
        reading = pin.described[0] if pin.described else None
        return info, _CheckedRead(rollouts, reads, reading, asked, time.monotonic() - started)


def _read_request(
    request: activations_pb2.ReadActivationsRequest, limits: ServerSettings, known_taps: int
) -> tuple[ActivationOptions, list[RolloutGroup], list[PendingText]]:
    check_rollout_counts(request.groups, limits)
    if len(request.taps) > known_taps:
        raise InvalidRequest("taps", f"{len(request.taps)} names or patterns, of {known_taps} taps; name each once")
    try:
        asked = activation_options_from_request(request)
        groups = groups_from_request(request)
    except MessageError as error:
        raise InvalidRequest(error.field, error.problem) from None
    if not asked.pools:
        raise InvalidRequest("pools", "at least one is needed")
    check_run(asked.priority, asked.run_id)
    return asked, groups, texts_of(groups, limits)


def _check_rollouts(
    groups: Sequence[RolloutGroup],
    info: EngineInfo,
    options: ResolvedOptions,
    encoded: dict[str, Any],
    limits: ServerSettings,
) -> list[list[CheckedRollout]]:
    """Checks the rollouts of a request for activations, and returns each with the number of bytes of its activations in the response."""
    assert options.activations is not None  # noqa: S101 - they are what is asked for
    checked = resolve_rollouts(
        groups,
        info,
        options,
        encoded=encoded,
        max_rollout_tokens=limits.max_rollout_tokens,
        max_request_tokens=limits.max_request_tokens,
    )
    cost, number_bytes = RequestCost.of(info, options), NUMBER_FORMATS[options.activations.dtype].item.itemsize
    rollouts = [[replace(rollout, activation_bytes=cost.values(rollout) * number_bytes) for rollout in group] for group in checked]
    total = sum(rollout.activation_bytes for group in rollouts for rollout in group)
    if total > limits.max_activation_bytes:
        remedy = "send it in several requests, or ask for fewer taps, for pools in place of tokens, or for bfloat16"
        limit = "max_activation_bytes"
        raise LimitExceeded("groups", total, "bytes of activations in its answer", limit, limits.max_activation_bytes, remedy)
    return rollouts


# ---------------------------------------------------------------------------------------------------------------------- writing


def _messages(
    delivery: Delivery, asked: _CheckedRead, info: EngineInfo, queue_seconds: float
) -> Iterator[activations_pb2.ReadActivationsResponse]:
    """Yields response messages with the activations of a delivery (rollouts of one call that have finished), each of about
    ``MAX_STREAMED_BYTES`` at most. A message is made only when the caller asks for it.
    """
    reads = asked.reads
    parts: list[activations_pb2.ActivationPart] = []
    begun: list[FinishedRollout] = []
    size = 0

    def message() -> activations_pb2.ReadActivationsResponse:
        nonlocal parts, begun, size
        usage = replace(
            Usage.total(one.result.usage for one in begun),
            queue_seconds=queue_seconds,
            compute_seconds=delivery.compute_seconds if begun else 0.0,
        )
        fingerprints, taps = (info.model.fingerprint, info.tokenizer_fingerprint), tuple(map(str, reads.taps))
        described = activations_info_to_proto(*fingerprints, taps, reads.all_pools, reads.dtype, usage, asked.reading)
        made = activations_pb2.ReadActivationsResponse(parts=parts, info=described)
        parts, begun, size = [], [], 0
        return made

    for one in delivery.finished:
        begun.append(one)
        views = zip(_tree(one.result.scores, ()), one.result.activations, strict=True)
        for (path, read), arrays in views:
            parts.append(begin_to_proto(one.group, one.completion, path, read))
            size += parts[-1].ByteSize()
            for (tap, pool), rows in arrays.items():
                row_bytes = rows.shape[1] * rows.itemsize
                first = 0
                while first < len(rows):
                    if parts and size + row_bytes > MAX_STREAMED_BYTES:
                        yield message()
                    count = max(1, (MAX_STREAMED_BYTES - size) // row_bytes)
                    parts.append(rows_to_proto(tap, pool, first, rows[first : first + count], reads.dtype))
                    first += count
                    size += parts[-1].ByteSize()
            if size > MAX_STREAMED_BYTES:
                yield message()
    if parts:
        yield message()


def _tree(read: CompletionScores, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], CompletionScores]]:
    """Yields a completion and then each of its follow-ups (token ids appended to it), which may have follow-ups in turn. Each is yielded
    with its path, the indices that lead to it from the completion.
    """
    yield path, read
    for index, follow_up in enumerate(read.follow_ups):
        yield from _tree(follow_up, (*path, index))
