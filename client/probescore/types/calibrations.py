"""Defines calibrated thresholds, the rollouts that they were found on, and how a scored rollout may be unlike those."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from probescore.reductions import Reduction


class PromptShape(str, Enum):
    """Enumeration of what a prompt's token ids show of its form, however the prompt was given.

    ``EMPTY`` has no ids; ``TEMPLATE`` ends as the model's chat template ends a prompt; ``TEXT`` is any other prompt. The members with
    ``BOS`` are the same for a rollout that starts with the token that begins a sequence (BOS).
    """

    EMPTY = "empty"
    TEXT = "text"
    TEMPLATE = "template"
    BOS_EMPTY = "bos empty"
    BOS_TEXT = "bos text"
    BOS_TEMPLATE = "bos template"


class CalibrationCondition(str, Enum):
    """Enumeration of the conditions under which a threshold is known to hold.

    ``COMPLETION_LENGTH`` counts the tokens that count under the mask, ``PROMPT_LENGTH`` the prompt's tokens; both must lie within what the
    negatives had. ``PROMPT_SHAPE`` must be one of theirs. ``SCOPE`` must be the completion.
    """

    COMPLETION_LENGTH = "completion_length"
    PROMPT_LENGTH = "prompt_length"
    PROMPT_SHAPE = "prompt_shape"
    SCOPE = "scope"


@dataclass(frozen=True)
class CalibratedRollouts:
    """Description of the negative rollouts on which a threshold was found; the threshold is not known to hold for others.

    Attributes:
        groups: number of groups in which the rollouts came, such as those of one prompt.
        dtype: dtype of the model that scored them, such as ``"bfloat16"``.
        shortest_prompt, longest_prompt: numbers of tokens.
        shortest_completion, longest_completion: numbers of tokens that count under the mask.
        prompt_forms: how the prompts were given: ``"ids"``, ``"text"``, ``"text with special tokens"``, ``"chat"``.
        prompt_shapes: what the ids of the prompts showed, each a value of ``PromptShape``; empty if nobody wrote it down.
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
        conditions: what the negatives were like; ``None`` where nobody wrote it down.
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
    """A condition of a calibration (threshold with the data it was found on) that a scored completion does not meet.

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
    """The completions of a response that do not meet one condition of a calibration (threshold with the data it was found on).

    Attributes:
        unmet: the condition and the calibration.
        completions: places of the completions in the response, ascending: in a ``ScoreResult`` those in ``ScoreResult.values``, in a stream
            those in the message that brought them.
    """

    unmet: UnmetCondition
    completions: tuple[int, ...]
