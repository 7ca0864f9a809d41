"""Probes that other libraries wrote: served, each gives the scores of an independent formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foreign_probes import CASES, Case, Read
from models import BOS, VOCAB_SIZE, tiny_model
from transformers import AutoModelForCausalLM

from probescore import Completion, RolloutGroup
from probescore_probes.importing import NOT_COMPARED, import_probe
from probescore_server import Engine

Rollout = tuple[list[int], list[int]]


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    random = np.random.default_rng(7)
    return [([BOS, *random.integers(4, VOCAB_SIZE, 4 + i).tolist()], random.integers(4, VOCAB_SIZE, 9 + 2 * i).tolist()) for i in range(4)]


@pytest.fixture(scope="module")
def read_by_hugging_face(reference):
    """What plain transformers gives, without anything of ours."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model("qwen3"), dtype=torch.float32).eval()

    def read(prompt: list[int], completion: list[int]) -> Read:
        blocks, attention, mlp, handles = [], [], [], []
        for block in model.model.layers:
            handles.append(block.register_forward_hook(lambda *a: blocks.append(a[2][0] if isinstance(a[2], tuple) else a[2])))
            handles.append(block.mlp.register_forward_hook(lambda *a: mlp.append(a[2])))
            handles.append(block.self_attn.register_forward_hook(lambda *a: attention.append(a[2][0])))
        with torch.inference_mode():
            states = model(torch.tensor([prompt + completion]), output_hidden_states=True).hidden_states
        for handle in handles:
            handle.remove()
        of = lambda tensors: [each.reshape(len(prompt) + len(completion), -1).double().numpy() for each in tensors]  # noqa: E731
        return Read(of(states), of(blocks), of(attention), of(mlp), len(prompt))

    return read


@pytest.fixture(params=CASES)
def case(request, tmp_path) -> Case:
    return CASES[request.param](tmp_path, np.random.default_rng(3))


def test_a_served_import_equals_an_independent_formula(case, reference, rollouts, read_by_hugging_face, tmp_path):
    output = tmp_path / "imported.onnx"
    made = import_probe(case.file, reference, name="imported", version="1", output=output, golden=rollouts[:2], **case.told)
    assert made.notes[0] == NOT_COMPARED

    engine = Engine.load(str(tiny_model("qwen3")), [output])
    groups = [RolloutGroup(prompt, [Completion(completion)]) for prompt, completion in rollouts]
    pools = made.probe.manifest.context.kind == "rollout"
    answers = [group[0]["imported"] for group in engine.score(groups, token_scores=() if pools else "all").groups]
    expected = [np.asarray(case.scores(read_by_hugging_face(*rollout))) for rollout in rollouts]
    if pools or expected[0].ndim == 0 or expected[0].shape[0] != len(rollouts[0][1]):
        found = np.array([answer.reduced[0].reshape(-1) for answer in answers])
        wanted = np.array([each.reshape(-1) for each in expected])
    else:
        found = np.concatenate([answer.tokens for answer in answers])
        wanted = np.concatenate([each.reshape(len(each), -1) for each in expected])
    assert found.shape == wanted.shape
    assert wanted.std(axis=0).min() > 0
    assert (np.abs(found - wanted).max(axis=0) <= 1e-4 * wanted.std(axis=0)).all()
