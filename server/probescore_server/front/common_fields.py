"""Checks what requests of several gRPC services have in common: their fields, the metadata and the deadline of an RPC, and whether the
server can answer already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import grpc

from probescore.types import RolloutGroup
from probescore.wire.contract import JOB_KEY
from probescore_server.errors import InvalidRequest, Mismatch, WorkerUnavailable
from probescore_server.registry.registry import ProbeRegistry
from probescore_server.rollouts import EngineInfo
from probescore_server.settings import ServerSettings
from probescore_server.validation.texts import PendingText, check_texts, pending_texts

MAX_RUN_ID_BYTES = 256
MAX_ABSOLUTE_PRIORITY = 100

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


def job_of(context: Context) -> str:
    """Returns the name of the training job that sent an RPC; in the server's queue, jobs take turns. The name is from the RPC's metadata
    or, if absent, the client's address.
    """
    for key, value in context.invocation_metadata() or ():
        if key == JOB_KEY:
            return str(value)
    return context.peer()


def deadline_of(context: Context, now: float) -> float:
    """Returns the time by which an RPC must be done, in seconds on a clock that shows ``now`` at present; infinity = no deadline."""
    remaining = context.time_remaining()
    return math.inf if remaining is None else now + remaining


def served_info(registry: ProbeRegistry) -> EngineInfo:
    """Returns the description of the model and of the probes that requests may name now.

    Raises:
        WorkerUnavailable: no worker process has been ready yet.
    """
    if registry.info is None:
        raise WorkerUnavailable("the server is starting", retry_seconds=1.0)
    return registry.info


def check_run(priority: int, run_id: str) -> None:
    """Raises ``InvalidRequest`` if a request's priority is out of bounds, or the id of the training run that it states is too long."""
    if abs(priority) > MAX_ABSOLUTE_PRIORITY:
        raise InvalidRequest("priority", f"{priority} is not between -{MAX_ABSOLUTE_PRIORITY} and {MAX_ABSOLUTE_PRIORITY}")
    if (size := len(run_id.encode())) > MAX_RUN_ID_BYTES:
        raise InvalidRequest("run_id", f"has {size} bytes; the limit is {MAX_RUN_ID_BYTES}")


def check_fingerprints(info: EngineInfo, expected_model: str, expected_tokenizer: str) -> None:
    """Raises ``Mismatch`` if the server's model or tokenizer has another fingerprint than a request expects (empty = any)."""
    pairs = (
        ("expected_model_fingerprint", info.model.fingerprint, expected_model),
        ("expected_tokenizer_fingerprint", info.tokenizer_fingerprint, expected_tokenizer),
    )
    for field, found, expected in pairs:
        if expected and expected != found:
            raise Mismatch(field, found or "none", expected)


def texts_of(groups: Sequence[RolloutGroup], limits: ServerSettings) -> list[PendingText]:
    """Returns the texts and chats of a request, which must be tokenised; raises ``LimitExceeded`` if one is too long."""
    texts = pending_texts(groups)
    check_texts(
        texts,
        max_rollout_tokens=limits.max_rollout_tokens,
        max_request_tokens=limits.max_request_tokens,
        max_text_bytes_per_token=limits.max_text_bytes_per_token,
        max_chat_messages=limits.max_chat_messages,
    )
    return texts
