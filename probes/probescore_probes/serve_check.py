"""Serves a probe file that was just written, and compares the served scores with those that its author's fit gave.

Golden vectors (scores in the file that a server must reproduce) compare token scores. They do not see that a probe was fitted on the last
token and is served as a mean, or that a nonlinear probe of mean activations is served token by token: only scores of whole rollouts do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
from numpy.typing import ArrayLike, NDArray

from probescore.types import Completion, CompletionStatus, RolloutGroup, TokenIds
from probescore_probes import arguments
from probescore_probes.reference import ReferenceModel
from probescore_server.errors import ProbeRefused
from probescore_server.probes.format.manifest import Manifest
from probescore_server.probes.format.probe_file import ProbeFile

if TYPE_CHECKING:
    from probescore_server.engine.engine import Engine

BOUND = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.05}
"""Limits on |fitted − served| of a rollout by dtype, in standard deviations of the fitted scores."""

REDUCTIONS = ("mean", "last", "max", "min", "sum")
"""Reductions of token scores that are tried, in this order, on a probe whose author names none."""

_ROUNDED = {"float32": 0.01, "bfloat16": 0.05, "float16": 0.05}
"""Largest median difference, in standard deviations, that rounding explains: stored activations of two bytes a number give .01."""
_ONE_ROUNDED = 0.5
"""Largest difference of a single rollout, in standard deviations, that rounding explains."""

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class ServeCheck:
    """Labelled rollouts with the scores that the author's fit gave them; ``write_probe`` serves the new probe file and compares its scores
    with these.

    Attributes:
        rollouts: rollouts as ``(prompt_ids, completion_ids)``, at least two.
        scores: the score of each whole rollout as the author's fit gave it, ``(n,)``, in the unit that the manifest's ``reduce_on`` names.
        positive: label of each rollout, ``(n,)``; if given, a message also says how well the fitted and the served scores tell the labels
            apart.
        dtype: dtype in which the file is served.
        model: directory of the model, or its id on the hub; by default where the reference model was loaded from.
    """

    rollouts: Sequence[tuple[TokenIds, TokenIds]]
    scores: ArrayLike
    positive: ArrayLike | None = None
    dtype: str = "float32"
    model: Path | str = ""


@dataclass(frozen=True, eq=False)
class CheckedRollouts:
    """Rollouts to compare a served probe file on, after the arguments of a ``ServeCheck`` were checked, with the scores that the author's
    fit gave them and their labels, ``(n,)`` each.
    """

    groups: list[RolloutGroup]
    fitted: NDArray[np.float64]
    positive: NDArray[np.bool_] | None
    dtype: str


def read_serve_check(given: Any, reference: ReferenceModel) -> CheckedRollouts:  # noqa: ANN401 - whatever an author hands over
    """Checks the parts of a ``ServeCheck``: rollouts on which a served probe file is compared with the scores that its author's fit gave.

    Raises:
        TypeError: a part has the wrong type.
        ValueError: there are fewer than two rollouts, scores or labels differ from them in number, all scores are the same, or there is no
            such dtype.
    """
    arguments.of_kind(given, "serve_check", ServeCheck, "give ServeCheck(rollouts=[…], scores=[…])")
    rollouts = list(arguments.rollouts(given.rollouts, "serve_check.rollouts", reference.vocabulary))
    if len(rollouts) < 2:
        raise ValueError(f"serve_check.rollouts: {len(rollouts)}; give at least two, better fifty, with their fitted scores")
    scores = np.asarray(arguments.real(given.scores, "serve_check.scores", "the fitted score of each rollout (n,)"), np.float64).ravel()
    positive = None if given.positive is None else np.asarray(given.positive).ravel().astype(bool)
    for argument, values in (("scores", scores), ("positive", positive)):
        if values is not None and len(values) != len(rollouts):
            raise ValueError(f"serve_check.{argument}: {len(values)} for {len(rollouts)} rollouts; give one for each")
    if not np.isfinite(scores).all() or not scores.std() > 0:
        raise ValueError("serve_check.scores: not finite, or all the same; give the score of each whole rollout as it was fitted")
    if given.dtype not in BOUND:
        raise ValueError(f"serve_check.dtype: {given.dtype!r}; give one of {', '.join(BOUND)}")
    groups = [RolloutGroup(prompt, [Completion(completion)]) for prompt, completion in rollouts]
    return CheckedRollouts(groups, scores, positive, given.dtype)


def engine_of(given: ServeCheck, reference: ReferenceModel, file: Path) -> Engine:
    """Returns an engine, which runs the model and its probes, to serve a probe file for the comparison that a ``ServeCheck`` describes.

    Raises:
        ValueError: the package that serves probe files is not installed.
        ProbeRefused: the engine refuses the file.
    """
    try:
        from probescore_server.engine.engine import Engine  # not a part of what writes probe files
    except ImportError as error:
        raise ValueError(
            f"serve_check: what serves a probe file is not installed (no module {error.name!r}); install 'probescore[server]', or "
            "'probescore[server-gpu]' on a GPU, beside 'probescore[probes]', or leave serve_check out"
        ) from None
    model = str(given.model or reference.model.name_or_path)
    return Engine.load(model, [file], dtype=given.dtype, device=str(reference.model.device))


def served_reduction(engine: Engine, checked: CheckedRollouts, file: ProbeFile, chosen: bool) -> str | None:
    """Returns the reduction (from token scores to one score of a rollout) under which a served probe gives the scores that its author's fit
    gave; ``None`` for a probe that pools by itself.

    Args:
        engine: engine that serves the one probe file.
        checked: rollouts with their fitted scores.
        file: the probe file.
        chosen: whether the author chose the manifest's reduction; else the one of ``REDUCTIONS`` that fits best is returned.

    Raises:
        ProbeRefused: served scores are not the fitted ones, so that the file computes another function.
    """
    manifest = file.manifest
    stated = manifest.reduction
    tried = [None] if stated is None else list(dict.fromkeys([stated, *REDUCTIONS]))
    apart = {reduction: _apart(_served(engine, checked, manifest, reduction), checked.fitted) for reduction in tried}
    nearest = min(tried, key=lambda reduction: (float(np.median(apart[reduction])), float(apart[reduction].max())))
    reduction = stated if chosen else nearest
    bound = max(BOUND[checked.dtype], manifest.golden.tolerance.float32 if checked.dtype == "float32" else 0.0)
    largest, median = float(apart[reduction].max()), float(np.median(apart[reduction]))
    if largest <= bound:
        return reduction
    found = f"served scores up to {largest:.3g} (median {median:.3g}) × the standard deviation of the fitted ones from these"
    if checked.positive is not None:
        from probescore_audit import auroc  # needs scipy, which what writes probe files does without

        served = _served(engine, checked, manifest, reduction)
        found += f"; AUROC {auroc(served, checked.positive):.3f} served, {auroc(checked.fitted, checked.positive):.3f} fitted"
    if not (median <= _ROUNDED[checked.dtype] and largest <= _ONE_ROUNDED):
        raise ProbeRefused(str(manifest.key), "reduction", found, _remedy(bound, checked.dtype, nearest, apart))
    logger.warning("served scores are a little off the fitted ones", probe=manifest.key, found=found, bound=bound, dtype=checked.dtype)
    return reduction


def _remedy(bound: float, dtype: str, nearest: str | None, apart: dict[str | None, NDArray[np.float64]]) -> str:
    wanted = f"at most {bound:g} × in {dtype}: the file serves another function than was fitted"
    if nearest is not None and float(np.median(apart[nearest])) <= _ROUNDED[dtype]:
        return f"{wanted}; the fitted scores are those of reduction={nearest!r}"
    if nearest is None:
        return f"{wanted}; give the scores of the very function that pools in the graph"
    return (
        f"{wanted}, with any of the reductions {', '.join(REDUCTIONS)}. A probe that is not linear and was fitted on pooled activations "
        'must pool inside its graph: Context(kind="rollout")'
    )


def _apart(served: NDArray[np.float64], fitted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns how far the scores that a probe file serves are from those that its author's fit gave, |fitted − served|, in standard
    deviations of the fitted scores; infinite where a rollout has no served score.
    """
    apart: NDArray[np.float64] = np.abs(served - fitted) / fitted.std()
    return np.where(np.isnan(apart), np.inf, apart)


def _served(engine: Engine, checked: CheckedRollouts, manifest: Manifest, reduction: str | None) -> NDArray[np.float64]:
    result = engine.score(checked.groups, reductions=[] if reduction is None else [reduction])
    found = np.full(len(checked.groups), np.nan)
    for index, group in enumerate(result.groups):
        completion = group.completions[0]
        if completion.status is CompletionStatus.OK:
            value = completion.scores[manifest.name].at(0, 0, 0)
            found[index] = np.nan if value is None else value
    return found
