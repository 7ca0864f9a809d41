"""Defines the value objects of the client: rollouts to score, and scores, server and probe descriptions that come back.

All classes here are frozen, contain numpy arrays rather than lists, and are shared by the client, the in-process ``Engine`` and the server.
"""

from probescore.types.activations import ActivationsInfo, CompletionActivations, Pool
from probescore.types.probes import Calibration, Hook, OutputPer, ProbeInfo, ScoredProbe, ScoreUnit, Tap, score_keys
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
)
from probescore.types.servers import Limits, ModelInfo, ServerInfo, Transfer, WorkerInfo

__all__ = [
    "FROZEN",
    "ActivationsInfo",
    "Calibration",
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
    "Pool",
    "ProbeInfo",
    "ProbeScores",
    "Reading",
    "ReadingKind",
    "ReadingScores",
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
    "Usage",
    "WorkerInfo",
    "score_keys",
]
