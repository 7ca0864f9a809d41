"""Makes a model with random weights and a calibrated probe for it: something to start the server with, and nothing to learn from.

python model.py FOLDER          # leaves FOLDER/model and FOLDER/probes/demo.onnx; what is there already stays as it is
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from probescore_probes import CalibrationRecord, ReferenceModel, linear_probe, write_probe

VOCAB_SIZE = 1000
HIDDEN_SIZE = 64
BLOCKS = 4
READS = "resid_post.2"
ROLLOUTS = 200
FLAGGED = 10
# The exact 95% interval of 10 in 200. `calibrate` computes it, with scipy, which the image does without.
INTERVAL = (0.0242, 0.0900)


def main(folder: Path) -> None:
    """Writes both, the probe last, so that a run that was cut short is done again."""
    probe = folder / "probes" / "demo.onnx"
    if probe.exists():
        return
    torch.manual_seed(0)
    make_model(folder / "model")
    make_probe(probe, folder / "model")
    for path in folder.rglob("*"):
        # the server runs as somebody else
        path.chmod(0o755 if path.is_dir() else 0o644)


def make_model(folder: Path) -> None:
    """A small Llama that knows the words w0 … w999."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        # wider than usual: with the usual range every token looks the same to a model that was not trained
        initializer_range=0.2,
    )
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def make_probe(path: Path, model: Path) -> None:
    """A random direction, that flags 1 random rollout in 20."""
    random = np.random.default_rng(0)
    rollouts = [(random.integers(VOCAB_SIZE, size=20), random.integers(VOCAB_SIZE, size=40)) for _ in range(ROLLOUTS)]
    reference = ReferenceModel.load(model)
    direction = random.standard_normal(HIDDEN_SIZE)
    means = sorted(float((rows @ direction).mean()) for rows in reference.completion_activations(rollouts, READS))
    calibration = CalibrationRecord(
        threshold=(means[-FLAGGED - 1] + means[-FLAGGED]) / 2,
        false_positive_rate=FLAGGED / ROLLOUTS,
        false_positive_rate_low=INTERVAL[0],
        false_positive_rate_high=INTERVAL[1],
        negatives=ROLLOUTS,
        dataset="random ids",
        reduction="mean",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_probe(
        path,
        linear_probe(direction),
        reference,
        name="demo",
        version="1",
        taps=[READS],
        golden=rollouts[:4],
        calibrations=[calibration],
        description="A random direction in a random model",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
