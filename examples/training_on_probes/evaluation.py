"""What a trained policy does on fresh problems, and how the probe scores that, on both readings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from conditions import POLICY, PROBE, READINGS, Condition
from reporting import says_copied
from sampling import sample_rollouts
from task import DIGITS, Problem
from training_settings import RunSettings
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from probescore import ProbeClient, RolloutGroup, StreamWindow

KNOWN = 300  # rollouts of each class from before training
GROUPS_PER_CALL = 512  # of one short rollout each


def evaluate(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], settings: RunSettings, condition: Condition
) -> None:
    """Writes what the trained policy does on fresh problems, and the probe's scores of that, and of the reference, on both readings."""
    folder = Path(settings.folder)
    model.eval().save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    rollouts = sample_rollouts(model, tokenizer, problems, settings.seed + 1, lambda _done: None)
    reference = np.load(Path(settings.base) / "reference.npz")
    chosen = np.concatenate([np.flatnonzero(reference["cheating"] == cheating)[:KNOWN] for cheating in (True, False)])
    told = [(reference["prompt_ids"][index], (ids := reference["completion_ids"][index])[ids >= 0]) for index in chosen]
    read = DIGITS if condition.reports else None
    groups = [RolloutGroup(rollout.prompt_ids, [rollout.completion_ids[:read]]) for rollout in rollouts]
    groups += [RolloutGroup(prompt, [ids]) for prompt, ids in told]
    scores = {reading: np.full(len(groups), np.nan) for reading in READINGS}
    with ProbeClient(settings.address) as client:
        client.load_reading(POLICY, folder / "policy", step=settings.steps)
        for scored in client.score_stream(groups, probes=PROBE, readings=READINGS, window=StreamWindow(groups_per_call=GROUPS_PER_CALL)):
            for reading in READINGS:
                scores[reading][scored.group_index] = scored.scores.on(reading).scores[PROBE].value
    fresh = len(rollouts)
    np.savez(
        folder / "evaluation.npz",
        cheating=np.array([rollout.cheating for rollout in rollouts]),
        solved=np.array([rollout.solved for rollout in rollouts]),
        says_copied=np.array(
            [{None: np.nan}.get(said, said) for said in (says_copied(np.array(r.completion_ids)) for r in rollouts)], float
        ),
        **{reading: values[:fresh] for reading, values in scores.items()},
        **{f"reference_{reading}": values[fresh:] for reading, values in scores.items()},
        reference_cheating=reference["cheating"][chosen],
    )
