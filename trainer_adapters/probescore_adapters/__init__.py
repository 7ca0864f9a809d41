"""Turns the scores of probes into changes of an RL trainer's rewards: a reward, a penalty, a screen (removal of rollouts), a gate
(reduction of the task's reward) or a monitor (only logged). There is one thin module per trainer.

The core imports the probescore client but no trainer. Each of ``probescore_adapters.trl``, ``.openrlhf``, ``.verl``, ``.verifiers`` and
``.http`` imports the trainer or web framework that it adapts.
"""

from probescore_adapters.cascade import Cascade, CascadeDecision
from probescore_adapters.errors import ProbeReplaced, ReadingGone, SignalError, Unscorable
from probescore_adapters.guard_rails import GuardRails
from probescore_adapters.outcome import Outcome
from probescore_adapters.record_options import PooledActivations, RecordOptions
from probescore_adapters.rollouts import Rollout
from probescore_adapters.scorer import Policy, ProbeScorer, score_rollouts
from probescore_adapters.signals import MaskKind, Mode, ProbeSignal, Transform

__all__ = [
    "Cascade",
    "CascadeDecision",
    "GuardRails",
    "MaskKind",
    "Mode",
    "Outcome",
    "Policy",
    "PooledActivations",
    "ProbeReplaced",
    "ProbeScorer",
    "ProbeSignal",
    "ReadingGone",
    "RecordOptions",
    "Rollout",
    "SignalError",
    "Transform",
    "Unscorable",
    "score_rollouts",
]
