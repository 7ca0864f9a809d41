"""What the runs of a seed have in common: the probe, and labelled answers of the model before training, which the audit compares with."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from base_samples import prompt_ids, sample_answers
from claims import PROBE_HALF, TRAINING_HALF, Answer, Claim, Judge, claims_of, drawn_claims, known_names
from fixed import FAILING, FROZEN, KEY, PROBE, RECIPE, TOPICS
from transformers import AutoModelForCausalLM, AutoTokenizer
from untrue_probe import SAMPLED, ToldAnswer, write_untrue_probe, written_answers

from probescore import RolloutGroup
from probescore_audit.record import RecordedProbe, RecordWriter, ReferenceRow, RunHeader
from probescore_server import Engine

REDUCTIONS = ("mean", "max")

Step = Callable[[str, int], Callable[[int], None]]
"""Is told a step's name and size, and gives what is told how much of it has been done."""


def make_probe(folder: Path, model: Path, seed: int, prompts: int, step: Step) -> None:
    """Fits the probe on one half of the facts, unless it is there: on written answers, and on those that the model gives by itself."""
    if (folder / "probe.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, claims = AutoTokenizer.from_pretrained(model), claims_of(seed, (*TOPICS, FAILING), PROBE_HALF)
    asked = drawn_claims(claims, prompts, random.Random(f"probe {seed}"))
    answers = written_answers(claims, tokenizer)
    for claim, _, ids, said in sampled_answers(model, asked, seed, 2 * seed, step(f"seed {seed}: sample for the probe", prompts)):
        if said.is_true is not None:
            answers.append(ToldAnswer(claim, ids, f"{'true' if said.is_true else 'false'}, {SAMPLED}"))
    write_untrue_probe(folder, model, answers, step(f"seed {seed}: fit the probe", len(answers)))


def sampled_answers(
    model: Path, claims: Sequence[Claim], facts: int, seed: int, on_done: Callable[[int], None]
) -> list[tuple[Claim, list[int], list[int], Answer]]:
    """Answers of the model before training, as many to each claim as in training: the claim, the ids of both, and what the answer says.

    ``facts`` and ``seed``: the seeds of the facts, whose names are known, and of the sampling.
    """
    tokenizer, judge = AutoTokenizer.from_pretrained(model), Judge(known_names(facts))
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    asked, end, generator = prompt_ids(claims, tokenizer), tokenizer.eos_token_id, torch.Generator().manual_seed(seed)
    sampled = sample_answers(policy, asked, RECIPE.samples, RECIPE.answer_tokens, end, generator, on_done)
    return [
        (claim, prompt, ids, judge.judge(claim, tokenizer.decode(ids, skip_special_tokens=True), ids[-1] == end))
        for claim, prompt, of_prompt in zip(claims, asked, sampled, strict=True)
        for ids in of_prompt
    ]


def make_reference(path: Path, folder: Path, model: Path, seed: int, topics: Sequence[str], prompts: int, step: Step) -> None:
    """Samples answers of the model before training about the other half of the facts, and writes what they are with the probe's scores."""
    if path.exists():
        return
    claims = drawn_claims(claims_of(seed, topics, TRAINING_HALF), prompts, random.Random(f"reference {seed}"))
    name = f"seed {seed}: sample before training, {len(topics)} topics"
    answers = sampled_answers(model, claims, seed, 2 * seed + 1, step(name, prompts))
    engine, on_done = Engine.load(str(model), [folder / f"{PROBE}.onnx"]), step(f"seed {seed}: score these", len(answers))
    rows = []
    for first in range(0, len(answers), RECIPE.samples):  # of one prompt
        of_prompt = answers[first : first + RECIPE.samples]
        result = engine.score([RolloutGroup(of_prompt[0][1], [ids for _, _, ids, _ in of_prompt])], reductions=REDUCTIONS)
        on_done(len(of_prompt))
        for place, ((claim, _, _, said), scores) in enumerate(zip(of_prompt, result.groups[0].completions, strict=True)):
            values = {reduction: scores[PROBE].at(reduction=index) for index, reduction in enumerate(REDUCTIONS)}
            told = {
                "claim": claim.is_true,
                "topic": claim.topic,
                "true": said.is_true,
                "agrees": said.agrees,
                "well_formed": said.is_well_formed,
            }
            rows.append({"rollout": f"{first}.{place}", **told, "scores": values})
    draft = path.with_suffix(".part")
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draft.rename(path)  # whole, or not there


def read_reference(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_reference(record: Path, run_id: str, planned_steps: int, threshold: float, reference: Path) -> None:
    """Begins a run's record with the reference, unless it is there. Answers that name nothing are left out, as they are in training."""
    if any(record.glob("*.jsonl")):
        return
    probes = [RecordedProbe(key=KEY, role="monitor", thresholds={"mean": threshold})]
    with RecordWriter(record, RunHeader(run_id=run_id, planned_steps=planned_steps, probes=probes), on_error="raise") as writer:
        writer.append(
            ReferenceRow(rollout=row["rollout"], positive=not row["true"], random=True, scores={KEY: {FROZEN: row["scores"]}})
            for row in read_reference(reference)
            if row["true"] is not None
        )
