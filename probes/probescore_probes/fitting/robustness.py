"""Measures how a probe's scores change on test rollouts that are altered, such as by appended text, and served again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from probescore.types import Chat
from probescore_audit import Estimate, grouped_auroc, grouped_rate
from probescore_probes.fitting.labelled_rollouts import Example
from probescore_probes.fitting.serving import replaced_ids, served_scores
from probescore_server.engine.engine import Engine
from probescore_server.errors import InvalidRequest

FILLER = " The weather was mild that day, and people went about their business."
FILLERS = (1, 4)
"""Numbers of neutral sentences that are appended to completions, one alteration for each number."""
MOST = 400
"""Limits how many test rollouts are altered and served again."""


@dataclass(frozen=True)
class Condition:
    """One alteration of the test rollouts and the quality of the served probe on the altered rollouts.

    Attributes:
        name: name of the alteration.
        auroc: AUROC with its interval.
        false_positives, recall: rates at the probe's threshold, with intervals; NaN without a threshold.
        shift: change of the mean score, divided by the standard deviation of the unaltered scores.
        refused: why a server refuses the altered rollouts for this probe; empty if it scores them. After a refusal the numbers are those
            that the probe would give without its check for BOS, or NaN if the refusal has another reason.
    """

    name: str
    auroc: Estimate
    false_positives: Estimate
    recall: Estimate
    shift: float
    refused: str = ""


_UNKNOWN = Estimate(float("nan"), float("nan"), float("nan"))


def measure(
    name: str,
    scores: NDArray[np.float64],
    examples: Sequence[Example],
    groups: NDArray[np.int64],
    threshold: float | None,
    usual: NDArray[np.float64],
) -> Condition:
    """Computes the quality of a served probe from its scores of altered rollouts."""
    positive = np.array([example.positive for example in examples])
    weights = np.array([example.weight for example in examples])
    known = ~np.isnan(scores)
    rates = [
        _UNKNOWN if threshold is None else grouped_rate(scores[known & kind] >= threshold, groups[known & kind])
        for kind in (~positive, positive)
    ]
    spread = float(np.nanstd(usual)) or 1.0
    return Condition(
        name,
        grouped_auroc(scores[known], positive[known], groups[known], weights=weights[known]),
        rates[0],
        rates[1],
        float(np.nanmean(scores) - np.nanmean(usual)) / spread,
    )


def changed_rollouts(engine: Engine, examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Returns altered rollouts, a dictionary keyed by the alteration.

    The alterations are: text appended, BOS added or removed, a chat template put around the prompt, and the prompt removed.
    """
    changed: dict[str, list[Example]] = {}
    for count in FILLERS:
        filler = engine.encode_completion(FILLER * count, field="filler")
        name = f"{count} neutral sentence{'s' if count > 1 else ''} appended"
        changed[name] = [
            replaced_ids(example, example.prompt_ids, np.concatenate([example.completion_ids, filler]).astype(np.int32))
            for example in examples
        ]
    bos = engine.info.bos_token_id
    if bos is not None:
        changed["BOS put in front, or taken away"] = [replaced_ids(example, _toggled(example.prompt_ids, bos)) for example in examples]
    if any(len(example.prompt_ids) for example in examples):
        keep = [] if bos is None or not any(len(e.prompt_ids) and e.prompt_ids[0] == bos for e in examples) else [bos]
        changed["no prompt"] = [replaced_ids(example, np.array(keep, np.int32)) for example in examples]
    texts = [example.prompt_text for example in examples]
    if all(texts):
        try:
            prompts = [engine.encode_prompt(Chat.of([{"role": "user", "content": text or ""}])) for text in texts]
        except InvalidRequest:  # there is no template, or it does not take this
            prompts = []
        if prompts:
            changed["chat template around the prompt"] = [replaced_ids(*pair) for pair in zip(examples, prompts, strict=True)]
    return changed


def conditions(
    engine: Engine,
    unchecked: Engine,
    examples: Sequence[Example],
    groups: NDArray[np.int64],
    threshold: float | None,
    usual: NDArray[np.float64],
) -> list[Condition]:
    """Measures a probe on the unaltered test rollouts, then on each alteration of them.

    Args:
        engine: engine that serves the probe file.
        unchecked: engine that serves the same probe without its check for BOS.
        examples: test rollouts.
        groups: group of each test rollout.
        threshold: threshold in the probe file.
        usual: served scores of the unaltered rollouts.
    """
    found = [measure("as they are", usual, examples, groups, threshold, usual)]
    for name, changed in changed_rollouts(engine, examples).items():
        refused = ""
        try:
            scores = served_scores(engine, changed)
        except (InvalidRequest, ValueError) as error:  # such as a prompt without the BOS that the probe expects
            refused = str(error)
            try:
                scores = served_scores(unchecked, changed)
            except (InvalidRequest, ValueError):
                found.append(Condition(name, _UNKNOWN, _UNKNOWN, _UNKNOWN, float("nan"), refused))
                continue
        found.append(replace(measure(name, scores, examples, groups, threshold, usual), refused=refused))
    return found


def _toggled(prompt: NDArray[np.int32], bos: int) -> NDArray[np.int32]:
    return prompt[1:] if len(prompt) and prompt[0] == bos else np.concatenate([np.array([bos], np.int32), prompt])
