"""Defines the value objects of the client: rollouts to score, and scores, server and probe descriptions that come back.

All classes here are frozen, contain numpy arrays rather than lists, and are shared by the client, the in-process ``Engine`` and the server.
"""

from probescore.types.activations import ActivationsInfo, CompletionActivations, Pool
from probescore.types.calibrations import (
    CalibratedRollouts,
    Calibration,
    CalibrationCondition,
    OutsideCalibration,
    PromptShape,
    UnmetCondition,
)
from probescore.types.probes import Hook, OutputPer, ProbeInfo, ScoredProbe, ScoreUnit, Tap, named_probe, score_keys, version_order
from probescore.types.readings import FROZEN, LoadedReading, Reading, ReadingKind
from probescore.types.rollouts import Chat, ChatMessage, Completion, RolloutGroup, Scope, Span, Text, TokenIds
from probescore.types.scores import (
    CompletionScores,
    CompletionStatus,
    GroupScores,
    ProbeScores,
    ReadingScores,
    ScoreResult,
    ScoringInfo,
    StreamedCompletion,
    Usage,
    with_unmet_conditions,
)
from probescore.types.servers import Limits, ModelInfo, RefusedProbeFile, ReloadedProbes, ServerInfo, Transfer, WorkerInfo

__all__ = [
    "FROZEN",
    "ActivationsInfo",
    "CalibratedRollouts",
    "Calibration",
    "CalibrationCondition",
    "Chat",
    "ChatMessage",
    "Completion",
    "CompletionActivations",
    "CompletionScores",
    "CompletionStatus",
    "GroupScores",
    "Hook",
    "Limits",
    "LoadedReading",
    "ModelInfo",
    "OutputPer",
    "OutsideCalibration",
    "Pool",
    "ProbeInfo",
    "ProbeScores",
    "PromptShape",
    "Reading",
    "ReadingKind",
    "ReadingScores",
    "RefusedProbeFile",
    "ReloadedProbes",
    "RolloutGroup",
    "Scope",
    "ScoreResult",
    "ScoreUnit",
    "ScoredProbe",
    "ScoringInfo",
    "ServerInfo",
    "Span",
    "StreamedCompletion",
    "Tap",
    "Text",
    "TokenIds",
    "Transfer",
    "UnmetCondition",
    "Usage",
    "WorkerInfo",
    "named_probe",
    "score_keys",
    "version_order",
    "with_unmet_conditions",
]
