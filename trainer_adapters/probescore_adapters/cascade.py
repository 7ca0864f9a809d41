"""Defines ``Cascade``, by which a judge (a language model) decides on rollouts where a probe is unsure."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Union

from probescore_adapters.judges import ChatJudge, JudgePrompt

ON_FAILURE = ("raise", "probe", "flag")
_OF_JUDGE = ("api_key_variable", "concurrency", "requests_per_minute", "timeout", "attempts", "parameters")


@dataclass(frozen=True)
class Cascade:
    """Second stage of a signal (a rule from a probe's scores to rewards) that flags rollouts: where the probe's score is near the
    threshold, a judge says whether a rollout has the behaviour, and the rollout counts as flagged if the judge says ``"yes"``.

    The probe's own flag stands where the judge is unsure, and for rollouts beyond the budget.

    Attributes:
        judge: the judge.
        band: distance from the threshold within which the probe is unsure, in the unit of the signal's score; or two distances, below the
            threshold and above it. Both ends belong to the band.
        budget: most rollouts of a training step that the judge is asked about, by each scorer; those nearest to the threshold come first.
            A batch without a step is a step of its own.
        on_failure: what happens to a rollout on which the judge gives no verdict: ``"raise"`` = scoring raises ``JudgeError``, ``"probe"``
            = the probe's own flag stands, ``"flag"`` = the rollout counts as flagged.
        seconds: time after which no verdict of a batch is waited for.

    Raises:
        ValueError: a field has none of the values above.
    """

    judge: ChatJudge
    band: Union[float, tuple[float, float]]
    budget: int = 32
    on_failure: Literal["raise", "probe", "flag"] = "raise"
    seconds: float = 120.0

    def __post_init__(self) -> None:
        if not callable(getattr(self.judge, "ask", None)):
            raise ValueError(f"cascade.judge: {self.judge!r:.80}; give a ChatJudge")
        ends = self.band if isinstance(self.band, (tuple, list)) else (self.band, self.band)
        if len(ends) != 2 or not all(_is_at_least(0, end) for end in ends) or not any(ends):
            raise ValueError(f"cascade.band: {self.band!r}; give a distance above 0, or two, below and above the threshold")
        object.__setattr__(self, "band", tuple(map(float, ends)))
        if isinstance(self.budget, bool) or not isinstance(self.budget, int) or self.budget < 1:
            raise ValueError(f"cascade.budget: {self.budget!r}; give a number of rollouts of at least 1")
        if self.on_failure not in ON_FAILURE:
            raise ValueError(f"cascade.on_failure: {self.on_failure!r}; give {', '.join(map(repr, ON_FAILURE))}")
        if not _is_at_least(0, self.seconds) or not self.seconds:
            raise ValueError(f"cascade.seconds: {self.seconds!r}; give a number above 0")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Cascade:
        """Makes a cascade from plain values, as configuration files have them.

        Args:
            given: the fields of ``Cascade`` but ``judge``; ``endpoint``, ``model`` and ``prompt``, the path of a file; and optionally
                ``prompt_version`` and the other arguments of ``ChatJudge``.

        Raises:
            ValueError: a field is unknown, missing or wrong, or the file cannot be read.
        """
        own = [each.name for each in fields(cls) if each.name != "judge"]
        required = ("endpoint", "model", "prompt", "band")
        known = (*required[:3], "prompt_version", *_OF_JUDGE, *own)
        for name in given:
            if name not in known:
                raise ValueError(f"cascade.{name}: there is no such field; there are {', '.join(known)}")
        for name in required:
            if given.get(name) is None:
                raise ValueError(f"cascade.{name}: missing")
        prompt = given["prompt"]
        if not isinstance(prompt, (str, os.PathLike)):
            raise ValueError(f"cascade.prompt: {prompt!r:.80}; give the path of a file")
        try:
            template = JudgePrompt.read(prompt, given.get("prompt_version") or "")
        except OSError as error:
            raise ValueError(f"cascade.prompt: {prompt}: {error.strerror}") from None
        of_judge = {name: given[name] for name in _OF_JUDGE if given.get(name) is not None}
        judge = ChatJudge(given["endpoint"], given["model"], template, **of_judge)
        return cls(judge, **{name: given[name] for name in own if given.get(name) is not None})

    def is_unsure(self, score: float, threshold: float) -> bool:
        """Returns whether a probe's score is so near to the threshold that the judge decides; false for a score that is missing."""
        below, above = self.band  # type: ignore[misc] # two since the cascade was made
        return threshold - below <= score <= threshold + above


@dataclass(frozen=True)
class CascadeDecision:
    """Value object with what each stage of a cascade said of a rollout on which the probe was unsure.

    Attributes:
        probe: whether the probe flags the rollout.
        verdict: the judge's verdict, ``"yes"``, ``"no"`` or ``"unsure"``; "" if it gave none.
        flagged: whether the rollout counts as flagged.
        reason: why the judge gave no verdict; "" if it gave one.
        labeller: the judge's model.
        labeller_version: version of the judge's prompt, and the model that answered if the endpoint names another.
    """

    probe: bool
    verdict: str
    flagged: bool
    reason: str = ""
    labeller: str = ""
    labeller_version: str = ""


def _is_at_least(least: float, value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= least
