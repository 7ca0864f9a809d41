"""Models whose rotary embedding changes with the length: exact up to where it does, and refused beyond."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from parity_models import BOS, HIDDEN, write_model
from transformers import AutoConfig

from probescore import RolloutGroup
from probescore_probes import ReferenceModel, linear_probe, write_probe
from probescore_server import Engine
from probescore_server.backbone.rotary import changing_rope_types, max_unchanged_positions
from probescore_server.errors import InvalidRequest

LIMIT = 64
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("longrope")
    return write_model(directory, "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=LIMIT, sliding_window=None)


def test_exact_up_to_the_limit_and_refused_beyond(long_model: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    ids = random.integers(4, 120, LIMIT)
    probe, weight = tmp_path / "linear.onnx", random.standard_normal(HIDDEN)
    golden = [(ids[:5], ids[5:20])]
    write_probe(
        probe, linear_probe(weight), ReferenceModel.load(long_model), name="linear", version="1", taps=["resid_post.2"], golden=golden
    )
    engine = Engine.load(str(long_model), [probe])
    ids[0] = BOS
    split = engine.score([RolloutGroup(ids[:50], [ids[50:]])], token_scores="all").groups[0][0]["linear"].tokens
    whole = engine.score([RolloutGroup(ids[:1], [ids[1:]])], token_scores="all").groups[0][0]["linear"].tokens
    assert split is not None
    assert whole is not None
    np.testing.assert_allclose(split, whole[-len(split) :], atol=1e-4)
    with pytest.raises(InvalidRequest, match=r"65 tokens .* original_max_position_embeddings \(beyond it .* changes\) is 64"):
        engine.score([RolloutGroup(ids[:50], [[*ids[50:], 5]])])


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, (None, [])),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}, (None, [])),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, (256, ["dynamic"])),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}, (32, ["dynamic"])),
    ],
    ids=str,
)
def test_where_an_embedding_changes(parameters: dict[str, object], expected: tuple[int | None, list[str]]) -> None:
    config = AutoConfig.for_model("llama", max_position_embeddings=256, rope_parameters=parameters)
    assert (max_unchanged_positions(config), changing_rope_types(config)) == expected


def test_model_without_rotary_embedding_has_no_such_limit() -> None:
    assert max_unchanged_positions(AutoConfig.for_model("gpt2")) is None
