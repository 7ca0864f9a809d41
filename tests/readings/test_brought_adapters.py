"""Probes that bring a LoRA adapter: they read the frozen model with it, and everything else stays as it is without them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from read_twice import BOUND, GOLDEN, GROUPS, TAPS, Served, direction, plain_scores, token_scores
from written_adapters import WrittenAdapter

from probescore_probes.exporting import linear_probe
from probescore_probes.reference import ReferenceModel
from probescore_probes.writing import write_probe
from probescore_server.probes.format.probe_file import read_probe_file

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.*": 3}},
    "some blocks": {"layers_to_transform": [1, 2]},
    "rank 80": {"r": 80},
}


def write(folder: Path, model: Path, name: str, tap: str = "middle", adapter: WrittenAdapter | None = None, version: str = "1") -> Path:
    """A linear probe as of ``read_twice``, with or without an adapter of its own."""
    path = folder / f"{name}-{version}.onnx"
    brought = None if adapter is None else adapter.write(folder / f"{name}-{version}")
    probe, reference = linear_probe(direction(tap)), ReferenceModel.load(model)
    write_probe(path, probe, reference, name=name, version=version, taps=[TAPS[tap]], golden=GOLDEN, adapter=brought)
    return path


@pytest.mark.parametrize("path", ["universal", "packed"])
def test_scores_are_those_of_the_model_with_the_adapter(llama: Served, tmp_path: Path, path: str, monkeypatch) -> None:
    adapters = {kind: WrittenAdapter.random(llama.model, seed=seed, **KINDS[kind]) for seed, kind in enumerate(KINDS)}
    own = [write(tmp_path, llama.model, kind.replace(" ", "-"), "last", adapter) for kind, adapter in adapters.items()]
    engine = (llama.engine if path == "universal" else llama.packed_engine)("early", "last")
    alone = engine.score(GROUPS, token_scores="all")
    served, refusals = engine.prepare_probes([read_probe_file(each) for each in [llama.probe("early"), llama.probe("last"), *own]])
    assert not refusals
    engine.adopt_probes(served)
    result = engine.score(GROUPS, token_scores="all")
    for kind, adapter in adapters.items():
        expected = plain_scores(adapter.merged(), ["last"])["last"]
        found = token_scores(result, kind.replace(" ", "-"))
        assert np.abs(found - expected).max() <= BOUND * expected.std()
    for name in ("early", "last"):
        assert np.array_equal(token_scores(result, name), token_scores(alone, name))
