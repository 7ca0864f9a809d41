"""Records of simulated runs, for tests: what a trainer would have written."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.simulated_runs import THRESHOLD, Change, simulate_step
from probescore_audit import Stratum, plan_labels
from probescore_audit.record import AnchorRow, LabelRow, RecordedProbe, RecordWriter, ReferenceRow, RolloutRow, RunHeader

KEY = "cheating@1"
PROMPTS = np.repeat(np.arange(32), 16)


def scores_of(**readings: float) -> dict[str, dict[str, dict[str, float]]]:
    return {KEY: {reading: {"mean": float(score)} for reading, score in readings.items()}}


def write_run(
    folder: Path,
    changes: list[Change],
    *,
    policy: list[Change] | None = None,
    labels: int = 32,
    seed: int = 0,
    references: bool = True,
    **more,
) -> dict[tuple[int, str], bool]:
    """Writes a run whose labels are shared out by the frozen scores, and returns which rollouts have the behaviour.

    With ``policy`` the same rollouts have scores on the policy as well, from the same noise.
    """
    rng = np.random.default_rng(seed)
    truth: dict[tuple[int, str], bool] = {}
    probe = RecordedProbe(key=KEY, thresholds={"mean": THRESHOLD})
    header = RunHeader(**{"run_id": "simulated", "planned_steps": len(changes), "probes": (probe,), "labels_per_step": labels} | more)
    with RecordWriter(folder, header, keep_texts=True) as writer:
        if references:
            positive, scores, _ = (np.concatenate(each) for each in zip(*(simulate_step(Change(), rng) for _ in range(8)), strict=True))
            writer.append(
                ReferenceRow(rollout=str(index), positive=bool(positive[index]), random=index < 2048, scores=scores_of(frozen=value))
                for index, value in enumerate(scores)
                if index < 2048 or positive[index]
            )
        for step, change in enumerate(changes):
            positive, frozen, _ = simulate_step(change, rng)
            seen = frozen.copy()
            if policy is not None:
                hidden = positive & (rng.random(len(positive)) < policy[step].hidden)
                seen = np.where(hidden, rng.standard_normal(len(positive)), frozen)
            truth |= {(step, str(index)): bool(value) for index, value in enumerate(positive)}
            writer.append(
                RolloutRow(
                    step=step,
                    rollout=str(index),
                    prompt=f"{step}.{PROMPTS[index]}",
                    scores=scores_of(frozen=frozen[index], **({} if policy is None else {"policy": seen[index]})),
                    text_sha256=f"sha256:{step}.{index}",
                    prompt_text=f"<b>prompt</b> {step}",
                    completion_text="the <script>cache</script>",
                )
                for index in range(len(positive))
            )
            if labels:
                plan = plan_labels(frozen, PROMPTS, THRESHOLD, labels, rng=rng)
                writer.append(
                    LabelRow(
                        step=step,
                        rollout=str(index),
                        label="yes" if positive[index] else "no",
                        source="checker",
                        text_sha256=f"sha256:{step}.{index}",
                        inclusion=chance,
                        stratum=Stratum(kind).name.lower(),
                        floor=bool(floor),
                    )
                    for index, chance, kind, floor in zip(plan.rollouts.tolist(), plan.inclusion, plan.stratum, plan.floor, strict=True)
                )
    return truth


def anchors(folder: Path, moved: float = 0.0, steps: tuple[int, ...] = (0, 5)) -> None:
    """Adds anchors that score otherwise at each step after the first."""
    header = RunHeader(run_id="simulated", planned_steps=20, probes=(RecordedProbe(key=KEY, thresholds={"mean": THRESHOLD}),))
    with RecordWriter(folder, header) as writer:
        writer.append(
            AnchorRow(step=step, anchor=str(index), positive=index < 10, scores=scores_of(frozen=index % 7 + (moved if step else 0.0)))
            for step in steps
            for index in range(20)
        )
