"""What scoring costs, beside what people write by hand: one run, both sides interleaved, ratios with their range.

    make bench

The model is made from a config (Qwen3, 12 blocks, hidden 768, vocabulary 32k, random weights), the probe is linear on ``resid_post`` of
block 6. One group: a prompt of about 400 tokens with 8 completions of 27 to 500. In float32, with one thread, per repetition:

    padded    AutoModelForCausalLM, one padded batch of 8, ``output_hidden_states=True``
    one by one  the same model, one sequence at a time, no padding
    engine    probescore's engine

Each must give the same scores. Seconds are of process CPU time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from probescore import RolloutGroup
from probescore_server import Engine
from probescore_server.probes import ReferenceModel, linear_probe, write_probe

LAYER = 6
Ids = NDArray[np.int64]
Scorer = Callable[[Ids, list[Ids]], list[NDArray[np.float32]]]


def make_model(directory: Path) -> None:
    config = Qwen3Config(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(config.vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(directory)


def make_load(random: np.random.Generator, vocab_size: int) -> tuple[Ids, list[Ids]]:
    prompt = random.integers(vocab_size, size=int(random.integers(350, 450)))
    return prompt, [random.integers(vocab_size, size=int(random.integers(27, 500))) for _ in range(8)]


def padded(model: torch.nn.Module, weight: torch.Tensor) -> Scorer:
    def score(prompt: Ids, completions: list[Ids]) -> list[NDArray[np.float32]]:
        sequences = [torch.from_numpy(np.concatenate([prompt, completion])) for completion in completions]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[LAYER + 1]
        return [(states[i, len(prompt) : len(sequence)] @ weight).numpy() for i, sequence in enumerate(sequences)]

    return score


def one_by_one(model: torch.nn.Module, weight: torch.Tensor) -> Scorer:
    alone = padded(model, weight)
    return lambda prompt, completions: [alone(prompt, [completion])[0] for completion in completions]


def engine(loaded: Engine) -> Scorer:
    def score(prompt: Ids, completions: list[Ids]) -> list[NDArray[np.float32]]:
        (group,) = loaded.score([RolloutGroup(prompt, completions)], token_scores="all").groups
        scores = [completion["direction"].tokens for completion in group]
        return [tokens[:, 0] for tokens in scores if tokens is not None]

    return score


@torch.inference_mode()
def run(repeats: int, threads: int) -> tuple[dict[str, list[float]], float]:
    """CPU seconds by variant, and the largest difference of scores as a multiple of their standard deviation."""
    torch.set_num_threads(threads)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        make_model(directory)
        reference = ReferenceModel.load(directory, model_id="benchmark")
        weight = random.standard_normal(768)
        golden = [(random.integers(32_000, size=8), random.integers(32_000, size=8))]
        probe = directory / "direction.onnx"
        write_probe(probe, linear_probe(weight), reference, name="direction", version="1", taps=[f"resid_post.{LAYER}"], golden=golden)
        model, direction = reference.model.eval(), torch.from_numpy(weight).float()
        variants = {
            "padded": padded(model, direction),
            "one by one": one_by_one(model, direction),
            "engine": engine(Engine.load(str(directory), [probe])),
        }
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        difference = 0.0
        for _ in track(range(repeats), "repetitions"):
            load = make_load(random, 32_000)
            scores = {}
            for name, scorer in variants.items():
                started = time.process_time()
                scores[name] = np.concatenate(scorer(*load))
                seconds[name].append(time.process_time() - started)
            expected = scores["one by one"]
            difference = max(difference, *(float(np.abs(found - expected).max() / expected.std()) for found in scores.values()))
    return seconds, difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    seconds, difference = run(options.repeats, options.threads)
    table = Table("variant", "CPU s", "× over padded", "range", title=f"{options.repeats} repetitions, {options.threads} thread(s)")
    for name, taken in seconds.items():
        ratios = [base / own for base, own in zip(seconds["padded"], taken, strict=True)]
        table.add_row(name, f"{median(taken):.2f}", f"{median(ratios):.2f}", f"{min(ratios):.2f}–{max(ratios):.2f}")
    console = Console()
    console.print(table)
    console.print(f"largest difference of a score: {difference:.1e} × the scores' standard deviation (bound: 1e-4)")
    if not difference <= 1e-4:
        raise SystemExit("the variants do not agree")


if __name__ == "__main__":
    main()
