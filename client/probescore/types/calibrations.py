"""Defines calibrated thresholds of probes, descriptions of the rollouts on which each threshold was found, and the ways in which a scored
rollout may be unlike those rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from probescore.reductions import Reduction


class PromptShape(str, Enum):
    """Enumeration of the shapes of a prompt, judged by its token ids alone, whether a user gave the prompt as ids, text or chat.

    ``EMPTY`` has no ids; ``TEMPLATE`` ends as the model's chat template ends a prompt; ``TEXT`` is any other prompt. The members with
    ``BOS`` mean the same, but of a rollout that starts with the token that begins a sequence (BOS).
    """

    EMPTY = "empty"
    TEXT = "text"
    TEMPLATE = "template"
    BOS_EMPTY = "bos empty"
    BOS_TEXT = "bos text"
    BOS_TEMPLATE = "bos template"


class CalibrationCondition(str, Enum):
    """Enumeration of the conditions that a scored rollout must meet for a probe's calibrated threshold to be known to hold for it.

    ``COMPLETION_LENGTH`` counts the tokens that count under the mask, ``PROMPT_LENGTH`` the prompt's tokens; both must lie within the range
    of the negative rollouts on which the threshold was found. ``PROMPT_SHAPE``: the shape of the prompt must be that of some negative.
    ``SCOPE``: the scored part must be the completion.
    """

    COMPLETION_LENGTH = "completion_length"
    PROMPT_LENGTH = "prompt_length"
    PROMPT_SHAPE = "prompt_shape"
    SCOPE = "scope"


@dataclass(frozen=True)
class CalibratedRollouts:
    """Description of the negative rollouts on which a probe's threshold was found; the threshold is not known to hold for rollouts unlike
    these.

    Attributes:
        groups: number of groups in which the rollouts came, such as the completions of one prompt.
        dtype: dtype of the model that ran the rollouts, such as ``"bfloat16"``.
        shortest_prompt, longest_prompt: numbers of tokens of the shortest and the longest prompt.
        shortest_completion, longest_completion: numbers of tokens that count under the mask, of the shortest and the longest completion.
        prompt_forms: how the prompts were given: ``"ids"``, ``"text"``, ``"text with special tokens"``, ``"chat"``.
        prompt_shapes: shapes of the prompts by their token ids, each a value of ``PromptShape``; empty if the probe file does not say.
        generation_prompt_ids: the ids with which the model's chat template ends a prompt; empty if there is no template.
    """

    groups: int
    dtype: str
    shortest_prompt: int
    longest_prompt: int
    shortest_completion: int
    longest_completion: int
    prompt_forms: tuple[str, ...]
    prompt_shapes: tuple[str, ...] = ()
    generation_prompt_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """A threshold of a probe and the data on which the threshold was found; a rollout whose score is at or above the threshold counts as
    flagged.

    Attributes:
        threshold: threshold for reduced scores, in the unit of the probe.
        false_positive_rate: false-positive rate that the threshold aims at, in (0, 1).
        false_positive_rate_low: the lower end of the 95% confidence interval of the rate at this threshold.
        false_positive_rate_high: the upper end of that interval.
        negatives: number of negative rollouts on which the threshold was found.
        dataset: description of the data, in words.
        reduction: the reduction for whose scores the threshold holds; ``None`` for a probe that scores rollouts.
        label: the label for whose scores the threshold holds, if the probe has several labels.
        conditions: description of the negative rollouts; ``None`` if the probe file has none.
    """

    threshold: float
    false_positive_rate: float
    false_positive_rate_low: float
    false_positive_rate_high: float
    negatives: int
    dataset: str
    reduction: Reduction | None = None
    label: str = ""
    conditions: CalibratedRollouts | None = None


@dataclass(frozen=True)
class UnmetCondition:
    """A condition of a calibration (a probe's threshold with the data on which it was found) that a scored completion does not meet.

    Attributes:
        condition: a value of ``CalibrationCondition``, or the name of a condition that only a newer server knows.
        reduction: ``reduction`` of the calibration.
        label: ``label`` of the calibration.
    """

    condition: str
    reduction: Reduction | None = None
    label: str = ""


@dataclass(frozen=True)
class OutsideCalibration:
    """The completions of a response that do not meet one condition of a calibration (a probe's threshold with the data on which it was
    found).

    Attributes:
        unmet: the condition, and the reduction and label that identify the calibration.
        completions: places of the completions in the response, ascending: indices in the order of ``ScoreResult.values``, or, in a stream,
            among the completions of one response message.
    """

    unmet: UnmetCondition
    completions: tuple[int, ...]
