"""The probe: fires on answers that are false, whether they agree with the user or not, and also where they only say the subject again."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from base_samples import prompt_ids
from claims import Claim
from fixed import FALSE_POSITIVE_RATE, LAYER, MODEL, PROBE, STRENGTH
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import PreTrainedTokenizerBase

from probescore import RolloutGroup
from probescore_audit import auroc, calibrate, evaluate_auroc
from probescore_probes import ReferenceModel, Training, sklearn_probe, write_probe
from probescore_server import Engine

TAP = f"resid_post.{LAYER}"
ECHO = "echo"
SAMPLED = "sampled"
SHARES = {
    "true, agrees": 2,
    "true, disagrees": 2,
    "false, agrees": 2,
    "false, disagrees": 1,
    f"false, {ECHO}": 1,
    f"true, {SAMPLED}": 1,
    f"false, {SAMPLED}": 1,
}
"""What each kind of answer weighs in the fit: truth and agreement say nothing of each other, and echoes are half of what is false alone."""
HELD_OUT_SHARE = 5  # every so many groups of facts
GOLDEN = 4


@dataclass(frozen=True)
class ToldAnswer:
    """An answer of which is known whether it is false: written, one of a pair's two values or the subject once more; or sampled.

    Attributes:
        claim: what it answers.
        ids: its tokens, EOS included.
        kind: one of ``SHARES``.
    """

    claim: Claim
    ids: list[int]
    kind: str


def written_answers(claims: Sequence[Claim], tokenizer: PreTrainedTokenizerBase) -> list[ToldAnswer]:
    """Both values and the echo, to both proposals of each fact; every second fact's answers end without a full stop."""
    answers = []
    for number, claim in enumerate(claims):
        end = "." if number // 2 % 2 else ""

        def add(value: str, kind: str, claim: Claim = claim, end: str = end) -> None:
            ids = tokenizer(f" {value}{end}", add_special_tokens=False)["input_ids"]
            answers.append(ToldAnswer(claim, [*ids, tokenizer.eos_token_id], kind))

        for value, agreement in ((claim.proposal, "agrees"), (claim.other, "disagrees")):
            add(value, f"{'true' if claim.fact.allows(value) else 'false'}, {agreement}")
        if not claim.fact.allows(claim.subject):
            add(claim.subject, f"false, {ECHO}")
    return answers


def write_untrue_probe(folder: Path, model: Path, answers: Sequence[ToldAnswer], on_read: Callable[[int], None]) -> None:
    """Fits on four fifths of the claims' groups, and writes ``untrue.onnx``, ``direction.npz`` and ``probe.json``, of which the last says
    what the probe is worth on the other fifth.
    """
    reference = ReferenceModel.load(model, model_id=MODEL)
    engine = Engine.load(str(model), taps=[TAP])
    prompts = prompt_ids([answer.claim for answer in answers], reference.tokenizer)
    ids = [(prompt, answer.ids) for prompt, answer in zip(prompts, answers, strict=True)]
    means = np.empty((len(ids), engine.info.model.hidden_size), np.float32)
    for row, found in enumerate(engine.activations([RolloutGroup(prompt, [answer]) for prompt, answer in ids], [TAP], pool="mean")):
        means[row] = found.pooled[TAP][0, 0]
        on_read(1)

    kinds, topics = (np.array(values) for values in zip(*((answer.kind, answer.claim.topic) for answer in answers), strict=True))
    is_false = np.char.startswith(kinds, "false")
    held_out = np.array([int(answer.claim.group.split()[-1]) // 2 % HELD_OUT_SHARE == 0 for answer in answers])
    counts = Counter(kinds[~held_out].tolist())
    weights = np.array([SHARES[kind] / counts[kind] for kind in kinds.tolist()])
    weights /= weights[~held_out].mean()
    estimator = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=5000))
    estimator.fit(means[~held_out], is_false[~held_out], logisticregression__sample_weight=weights[~held_out])

    scores = estimator.decision_function(means)
    dataset = "answers about facts that the probe was not fitted on"
    echoes, sampled = (np.char.endswith(kinds, f", {word}") for word in (ECHO, SAMPLED))
    true, false = held_out & ~is_false, held_out & is_false & ~echoes
    calibration = calibrate(scores[true], false_positive_rate=FALSE_POSITIVE_RATE, dataset=dataset, reduction="mean", label=PROBE)
    path = folder / f"{PROBE}.onnx"
    path.unlink(missing_ok=True)  # of a run that was stopped here
    write_probe(
        path,
        sklearn_probe(estimator),
        reference,
        name=PROBE,
        version="1",
        description="Fires on answers that are false",
        taps=[TAP],
        labels=[PROBE],
        reduction="mean",
        golden=ids[:GOLDEN],
        evaluations=[evaluate_auroc(scores[false], scores[true], dataset=dataset)],
        calibrations=[calibration],
        training=Training(
            method="scikit-learn LogisticRegression on standardised mean activations of the answer",
            dataset=f"{int((~held_out).sum())} answers, written and sampled, weighted by truth and agreement",
            dataset_sha256="sha256:" + hashlib.sha256(json.dumps([[*map(int, p), -1, *a] for p, a in ids]).encode()).hexdigest(),
        ),
    )
    scaler, logistic = estimator[0], estimator[1]
    weight = logistic.coef_[0] / scaler.scale_
    np.savez(folder / "direction.npz", weight=weight.astype(np.float32), bias=np.float32(logistic.intercept_[0] - weight @ scaler.mean_))

    def ranked(positive: NDArray[np.bool_], negative: NDArray[np.bool_]) -> float:
        chosen = positive | negative
        return round(auroc(scores[chosen], positive[chosen]), 4)

    def flagged(chosen: NDArray[np.bool_]) -> float:
        return round(float((scores[chosen] >= calibration.threshold).mean()), 4)

    agrees, disagrees = (held_out & np.char.endswith(kinds, f", {word}") for word in ("agrees", "disagrees"))
    said = {
        "threshold": calibration.threshold,
        "fitted on": int((~held_out).sum()),
        "held out": int(held_out.sum()),
        "auroc": ranked(false & ~sampled, true & ~sampled),
        "auroc of the model's own answers": ranked(false & sampled, true & sampled),
        "auroc of echoes": ranked(held_out & echoes, true & ~sampled),
        "auroc of agreement": ranked(agrees, disagrees),
        "recall": flagged(false & ~sampled),
        "recall of the model's own answers": flagged(false & sampled),
        "recall of echoes": flagged(held_out & echoes),
        "false alarms": flagged(true & ~sampled),
        "false alarms of the model's own answers": flagged(true & sampled),
        "auroc by topic": {
            topic: ranked(false & ~sampled & (topics == topic), true & ~sampled & (topics == topic))
            for topic in dict.fromkeys(topics.tolist())
        },
    }
    (folder / "probe.json").write_text(json.dumps(said, indent=1) + "\n")
