"""Client library that scores rollouts with probes (small classifiers over a language model's activations), over gRPC.

``ProbeClient`` and ``AsyncProbeClient`` send requests to a probescore server. The other names of this package are the values that the
clients take and return, and the errors that they raise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from probescore.errors import (
    AuthenticationError,
    DeadlineExceededError,
    FieldViolation,
    InvalidRequestError,
    MessageTooLargeError,
    MismatchError,
    OutOfMemoryError,
    OverloadedError,
    ProbescoreError,
    ServerError,
    TransientError,
    UnavailableError,
)
from probescore.fingerprints import tokenizer_fingerprint
from probescore.padded import rollouts_from_padded
from probescore.reductions import Reduction, ReductionKind, reduce_scores
from probescore.types import (
    ActivationsInfo,
    CalibratedRollouts,
    Calibration,
    CalibrationCondition,
    Chat,
    ChatMessage,
    Completion,
    CompletionActivations,
    CompletionScores,
    CompletionStatus,
    GroupScores,
    Hook,
    Limits,
    LoadedReading,
    ModelInfo,
    OutputPer,
    OutsideCalibration,
    Pool,
    ProbeInfo,
    ProbeScores,
    PromptShape,
    Reading,
    ReadingKind,
    ReadingScores,
    RefusedProbeFile,
    ReloadedProbes,
    RolloutGroup,
    Scope,
    ScoredProbe,
    ScoreResult,
    ScoreUnit,
    ScoringInfo,
    ServerInfo,
    Span,
    StreamedCompletion,
    Tap,
    Text,
    Transfer,
    UnmetCondition,
    Usage,
    WorkerInfo,
)

if TYPE_CHECKING:
    from probescore._activation_calls import ReadOptions
    from probescore._aio import AsyncProbeClient
    from probescore._options import ScoreOptions
    from probescore._streaming import StreamWindow
    from probescore._sync import ProbeClient
    from probescore.checks import check_groups

# What needs gRPC or protobuf is imported when it is first used: the server's workers and the adapters use the values without it.
_LAZY = {
    "AsyncProbeClient": "probescore._aio",
    "ProbeClient": "probescore._sync",
    "ReadOptions": "probescore._activation_calls",
    "ScoreOptions": "probescore._options",
    "StreamWindow": "probescore._streaming",
    "check_groups": "probescore.checks",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "ActivationsInfo",
    "AsyncProbeClient",
    "AuthenticationError",
    "CalibratedRollouts",
    "Calibration",
    "CalibrationCondition",
    "Chat",
    "ChatMessage",
    "Completion",
    "CompletionActivations",
    "CompletionScores",
    "CompletionStatus",
    "DeadlineExceededError",
    "FieldViolation",
    "GroupScores",
    "Hook",
    "InvalidRequestError",
    "Limits",
    "LoadedReading",
    "MessageTooLargeError",
    "MismatchError",
    "ModelInfo",
    "OutOfMemoryError",
    "OutputPer",
    "OutsideCalibration",
    "OverloadedError",
    "Pool",
    "ProbeClient",
    "ProbeInfo",
    "ProbeScores",
    "ProbescoreError",
    "PromptShape",
    "ReadOptions",
    "Reading",
    "ReadingKind",
    "ReadingScores",
    "Reduction",
    "ReductionKind",
    "RefusedProbeFile",
    "ReloadedProbes",
    "RolloutGroup",
    "Scope",
    "ScoreOptions",
    "ScoreResult",
    "ScoreUnit",
    "ScoredProbe",
    "ScoringInfo",
    "ServerError",
    "ServerInfo",
    "Span",
    "StreamWindow",
    "StreamedCompletion",
    "Tap",
    "Text",
    "Transfer",
    "TransientError",
    "UnavailableError",
    "UnmetCondition",
    "Usage",
    "WorkerInfo",
    "check_groups",
    "reduce_scores",
    "rollouts_from_padded",
    "tokenizer_fingerprint",
]
