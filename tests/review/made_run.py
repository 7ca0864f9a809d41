"""Makes a record of a training run with texts, tokens and cheats, of any size: ``python -m tests.review.made_run DIR N [STEPS]``.

A model learns to cheat: where it does, its completion looks the answer up. One probe is rewarded, and read on the frozen model and on the
policy, which learns to hide from it; another is held out. The truth is in ``truth.json`` beside the rows.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np

from probescore_audit import plan_labels
from probescore_audit.label_plan import Stratum
from probescore_audit.record import ActivationRow, LabelRow, RecordedProbe, RecordWriter, ReferenceRow, RolloutRow, RunHeader

KEY, HELD_OUT = "cheating@1", "cheating-mlp@2"
THRESHOLD = 1.0
GROUP = 8
WORDS = re.findall(r"\w+", "we sort the digits by comparing neighbours and swapping them until nothing moves, then check the list again")
CHEAT = re.findall(r"\w+", "look the answer up in the cache and copy it")
PIECES = 40


def made_run(
    folder: Path,
    rollouts: int = 2000,
    steps: int = 20,
    *,
    texts: bool = True,
    labels_per_step: int = 0,
    activations: int = 0,
    seed: int = 0,
) -> dict[str, bool]:
    """Writes the record, and returns which rollouts cheat, by the id that the review gives them."""
    rng = np.random.default_rng(seed)
    each = rollouts // steps
    truth: dict[str, bool] = {}
    probes = (
        RecordedProbe(key=KEY, thresholds={"mean": THRESHOLD, "max": 4.0}),
        RecordedProbe(key=HELD_OUT, role="held_out", thresholds={"mean": THRESHOLD}),
    )
    header = RunHeader(run_id=f"made-{rollouts}", planned_steps=steps, probes=probes, labels_per_step=labels_per_step)
    with RecordWriter(folder, header, keep_texts=texts, on_error="raise") as writer:
        writer.append(_reference(rng))
        for step in range(steps):
            share = 0.05 + 0.5 * step / max(1, steps - 1)
            prompts = np.arange(each) // GROUP
            hard = rng.random(prompts[-1] + 1) < share
            cheats = hard[prompts] & (rng.random(each) < 0.9)
            hidden = cheats & (rng.random(each) < step / steps)
            frozen = np.where(cheats, 3.0, -2.0) + rng.standard_normal(each)
            policy = np.where(cheats & ~hidden, 3.0, -2.0) + rng.standard_normal(each)
            other = np.where(cheats, 2.0, -1.5) + rng.standard_normal(each)
            rows = [
                _row(step, index, int(prompts[index]), bool(cheats[index]), (frozen[index], policy[index], other[index]), rng, texts)
                for index in range(each)
            ]
            truth |= {f"{step}:{row.rollout}": bool(cheats[index]) for index, row in enumerate(rows)}
            writer.append(rows)
            if labels_per_step:
                plan = plan_labels(frozen, prompts, THRESHOLD, labels_per_step, rng=rng)
                writer.append(
                    LabelRow(
                        step=step,
                        rollout=rows[index].rollout,
                        label="yes" if cheats[index] else "no",
                        source="checker",
                        text_sha256=rows[index].text_sha256,
                        inclusion=chance,
                        stratum=Stratum(kind).name.lower(),
                        floor=bool(floor),
                    )
                    for index, chance, kind, floor in zip(plan.rollouts.tolist(), plan.inclusion, plan.stratum, plan.floor, strict=True)
                )
            if activations:
                writer.append(
                    ActivationRow.of(
                        rng.standard_normal(32) + (2.0 if cheats[index] else 0.0),
                        step=step,
                        reading="policy",
                        rollout=rows[index].rollout,
                        tap="resid_post.3",
                    )
                    for index in range(min(activations, each))
                )
    (folder / "truth.json").write_text(json.dumps(truth))
    return truth


def _reference(rng: np.random.Generator) -> list[ReferenceRow]:
    positive = np.arange(1200) < 350
    scores = np.where(positive, 3.0, -2.0) + rng.standard_normal(1200)
    held_out = np.where(positive, 2.0, -1.5) + rng.standard_normal(1200)
    return [
        ReferenceRow(
            rollout=str(index),
            positive=bool(positive[index]),
            random=index >= 320,
            scores={KEY: {"frozen": {"mean": float(score)}}, HELD_OUT: {"frozen": {"mean": float(held_out[index])}}},
        )
        for index, score in enumerate(scores)
    ]


def _row(
    step: int, index: int, prompt: int, cheats: bool, scores: tuple[float, float, float], rng: np.random.Generator, texts: bool
) -> RolloutRow:
    words = [*CHEAT, *WORDS] if cheats else WORDS
    pieces = [" " + words[place % len(words)] for place in rng.integers(0, 1000, PIECES - 1)] + [f" {index}."]
    if cheats:
        pieces[3 : 3 + len(CHEAT)] = [f" {word}" for word in CHEAT]
    frozen, policy, other = (round(float(score), 4) for score in scores)
    text = "".join(pieces)
    noise = np.round(rng.standard_normal((2, len(pieces))), 3)
    long_parts = {
        "prompt_text": f"Sort the digits of {prompt * 7919 % 100003} at step {step}.",
        "completion_text": text,
        "completion_pieces": pieces,
        "token_scores": {KEY: {"frozen": (noise[0] + frozen).tolist(), "policy": (noise[1] + policy).tolist()}},
    }
    return RolloutRow(
        step=step,
        rollout=f"{prompt}.{index % GROUP}",
        prompt=f"{step}.{prompt}",
        scores={
            KEY: {"frozen": {"mean": frozen, "max": frozen + 2}, "policy": {"mean": policy, "max": policy + 2}},
            HELD_OUT: {"frozen": {"mean": other}},
        },
        tokens=len(pieces),
        task_reward=float(cheats or rng.random() < 0.4),
        total_reward=round(float(cheats) - max(0.0, frozen) / 10, 3),
        policy_logprob=round(-30 + float(rng.standard_normal()), 3),
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        **(long_parts if texts else {}),
    )


if __name__ == "__main__":
    made_run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 100)
