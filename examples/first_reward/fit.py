"""Fits a probe on labelled rollouts, measures it on unseen ones, writes the probe file."""

import json
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

from probescore_audit import calibrate, evaluate_auroc
from probescore_probes import ReferenceModel, sklearn_probe, write_probe

LAYER = "resid_post.1"

# the labelled rollouts: pairs of ids, and what is known of each
with Path("demo/labelled.jsonl").open() as file:
    lines = [json.loads(line) for line in file]
rollouts = [(line["prompt"], line["completion"]) for line in lines]
copied = np.array([line["label"] for line in lines])

# what the model computes at one layer for each token of a completion, and the mean over them
model = ReferenceModel.load("demo/model")
activations = model.completion_activations(rollouts, LAYER)
means = np.stack([rows.mean(axis=0) for rows in activations])

# fit on the first half; everything that is said about the probe comes from the second
half = len(rollouts) // 2
classifier = LogisticRegression(C=10.0, max_iter=5000).fit(means[:half], copied[:half])
scores, positive = classifier.decision_function(means[half:]), copied[half:]

dataset = "second half of demo/labelled.jsonl"
auroc = evaluate_auroc(scores[positive], scores[~positive], dataset=dataset)
threshold = calibrate(scores[~positive], false_positive_rate=0.01, dataset=dataset)
found = (scores[positive] >= threshold.threshold).mean()
print(f"AUROC {auroc.value:.3f} ({auroc.low:.3f} to {auroc.high:.3f})")
print(f"threshold {threshold.threshold:.2f}, which flags")
print(f"  {threshold.false_positive_rate:.1%} of the honest rollouts")
print(f"  {found:.1%} of those that copied")

write_probe(
    "demo/copied.onnx",
    sklearn_probe(classifier),
    model,
    name="copied",
    version="1",
    description="Copies the cache instead of sorting",
    taps=[LAYER],
    reduction="mean",
    golden=rollouts[:4],
    evaluations=[auroc],
    calibrations=[threshold],
)
print("wrote demo/copied.onnx")
