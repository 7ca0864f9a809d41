"""Scores on trained weights: as near to float64 as plain Hugging Face in float32 is, over more than 10,000 tokens of each kind.

The text is prose, code and chats, after a BOS, after none and from the middle of a word. The first token of a sequence is where the
activations of this model get massive, and what they are there depends on what it is: so the other kind is short sequences behind every
29th token of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from parity_bound import further_than_plain_float32
from transformers import AutoModel, AutoTokenizer

from probescore.types import RolloutGroup, Scope, ScoreUnit
from probescore_probes.exporting import linear_probe
from probescore_probes.reference import ReferenceModel
from probescore_probes.writing import write_probe
from probescore_server import Engine

MIN_TOKENS = 10_000
TAPS = [
    *(f"resid_post.{layer}" for layer in (0, 4, 9, 14, 19, 24, 29)),
    *(f"{hook}.{layer}" for hook in ("attn_out", "mlp_out") for layer in (14, 27)),
    "final_norm",
]
LENGTHS = (4, 30, 120, 300, 700)
DIRECTIONS = 8

Group = tuple[list[int], list[list[int]]]


def _prose_and_code(tokenizer: Any) -> list[list[int]]:
    root = Path(__file__).parents[2]
    prose = "\n".join(path.read_text() for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))])
    code = "\n".join(path.read_text() for path in sorted((root / "server").rglob("*.py")))
    return [tokenizer(text, add_special_tokens=False).input_ids for text in (prose, code)]


def _text(model: Path) -> Iterator[Group]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = _prose_and_code(tokenizer)
    random = np.random.default_rng(0)
    total = 0
    for number, length, form in zip(range(10_000), cycle(LENGTHS), cycle(["bare", "bos", "chat", "one token"])):
        text = texts[number % 3 == 2]
        start = int(random.integers(0, len(text) - 3000))
        prompt, answers = text[start : start + length], [text[start + length : start + 2 * length], text[start + 1500 :][:length]]
        if form == "chat":
            messages = [{"role": "user", "content": tokenizer.decode(prompt)}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            answers = [[*answer, tokenizer.eos_token_id] for answer in answers]
        else:
            prompt = {"bare": prompt, "bos": [tokenizer.bos_token_id, *prompt], "one token": prompt[:1]}[form]
        yield list(prompt), answers
        total += sum(len(prompt) + len(answer) for answer in answers)
        if total >= MIN_TOKENS:
            return


def _short_sequences(model: Path) -> Iterator[Group]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    prose, _ = _prose_and_code(tokenizer)
    random = np.random.default_rng(1)
    for first in range(0, len(tokenizer), 29):
        start = int(random.integers(0, len(prose) - 6))
        yield [first, *prose[start : start + 2]], [prose[start + 2 : start + 6]]


GROUPS = {"text": _text, "short sequences": _short_sequences}


@pytest.fixture(scope="module")
def directions(trained_model: Path) -> dict[str, NDArray[np.float32]]:
    width = AutoModel.from_pretrained(trained_model).config.hidden_size
    random = np.random.default_rng(5)
    return {tap: (random.standard_normal((DIRECTIONS, width)) / np.sqrt(width)).astype(np.float32) for tap in TAPS}


def plain_scores(
    model: Path, groups: list[Group], directions: dict[str, NDArray[np.float32]], dtype: torch.dtype
) -> dict[str, NDArray[np.float64]]:
    """Scores of all tokens by plain Hugging Face, one sequence at a time, by tap: ``(tokens, directions)``."""
    whole = AutoModel.from_pretrained(model, dtype=dtype).eval()
    seen: dict[str, torch.Tensor] = {}
    for tap in TAPS:
        hook, _, layer = tap.partition(".")
        name = {"resid_post": "layers.{}", "attn_out": "layers.{}.self_attn", "mlp_out": "layers.{}.mlp", "final_norm": "norm"}[hook]

        def keep(_module: object, _inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...], tap: str = tap) -> None:
            seen[tap] = output if isinstance(output, torch.Tensor) else output[0]

        whole.get_submodule(name.format(layer)).register_forward_hook(keep)
    scores: dict[str, list[NDArray[np.float64]]] = {tap: [] for tap in TAPS}
    with torch.inference_mode():
        for ids in (prompt + answer for prompt, answers in groups for answer in answers):
            whole(input_ids=torch.tensor([ids]), use_cache=False)
            for tap in TAPS:
                scores[tap].append(seen[tap][0].double().numpy() @ directions[tap].T.astype(np.float64))
    return {tap: np.concatenate(parts) for tap, parts in scores.items()}


@pytest.mark.parametrize("kind", GROUPS)
def test_scores_of_trained_weights_are_no_further_from_float64_than_plain_float32_is(
    trained_model: Path, directions: dict[str, NDArray[np.float32]], tmp_path: Path, kind: str
) -> None:
    groups = list(GROUPS[kind](trained_model))
    reference = ReferenceModel.load(trained_model)
    golden = [(prompt, answers[0]) for prompt, answers in groups[1:3]]
    files = [tmp_path / f"{tap}.onnx" for tap in TAPS]
    for tap, file in zip(TAPS, files, strict=True):
        probe = linear_probe(directions[tap], unit=ScoreUnit.VALUE)
        labels = [f"direction {number}" for number in range(DIRECTIONS)]
        write_probe(file, probe, reference, name=tap.replace(".", "-"), version="1", taps=[tap], labels=labels, golden=golden)
    del reference

    engine = Engine.load(str(trained_model), files)
    results = [engine.score([RolloutGroup(prompt, answers)], token_scores="all", scope=Scope.ALL) for prompt, answers in groups]
    float64 = plain_scores(trained_model, groups, directions, torch.float64)
    float32 = plain_scores(trained_model, groups, directions, torch.float32)
    missed = {}
    for tap in TAPS:
        scored = [completion[tap.replace(".", "-")].tokens for result in results for completion in result.groups[0]]
        found = np.concatenate([tokens for tokens in scored if tokens is not None])
        assert found.shape == float64[tap].shape
        assert len(found) >= MIN_TOKENS
        mean, deviation = float64[tap].mean(0), float64[tap].std(0)
        ours, plain, exact = (((scores - mean) / deviation).ravel() for scores in (found, float32[tap], float64[tap]))
        for scores, name in ((ours, "ours"), (plain, "plain float32")):
            print(f"{tap:14} {name:14} " + "  ".join(f"{np.quantile(np.abs(scores - exact), share):.1e}" for share in (0.5, 0.99, 1)))
        if further := further_than_plain_float32(ours, plain, exact):
            missed[tap] = further
    assert missed == {}
