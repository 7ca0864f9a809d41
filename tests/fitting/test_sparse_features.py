"""One feature of a sparse autoencoder as a probe: found among many, named, or refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from foreign_autoencoders import D_SAE, autoencoder
from made_rollouts import reference
from models import HIDDEN_SIZE

from probescore_probes.fitting import sparse_features
from probescore_probes.fitting.sparse_features import SparseFeatures, choose_feature


def test_the_feature_that_fires_on_the_behaviour_is_found_among_many():
    random = np.random.default_rng(0)
    positive = np.arange(100) % 2 == 0
    pooled = {pool: np.maximum(random.standard_normal((100, 500)), 0).astype(np.float32) for pool in ("mean", "max")}
    pooled["max"][:, 321] += 2 * positive
    pooled["max"][:, 17] -= 3 * positive  # fires on what is not the behaviour
    pool, column, found = choose_feature(pooled, positive, np.ones(100))
    assert (pool, column) == ("max", 321)
    assert found > 0.9


def test_features_are_pooled_over_each_rollouts_own_tokens(tmp_path):
    folder, features_of = autoencoder(tmp_path / "sae", "blocks.1.hook_resid_post")
    random = np.random.default_rng(1)
    rows = [random.standard_normal((length, HIDDEN_SIZE)).astype(np.float32) for length in (1, 7, 3, *[2] * 20)]
    found = SparseFeatures.read(folder, None, reference())
    assert found.tap == "resid_post.1"
    assert found.features == tuple(range(D_SAE))
    pooled = found.pooled(rows)
    np.testing.assert_allclose(pooled["mean"], [features_of(each).mean(axis=0) for each in rows], atol=1e-4)
    np.testing.assert_allclose(pooled["max"], [features_of(each).max(axis=0) for each in rows], atol=1e-4)
    named = SparseFeatures.read(folder, 11, reference())
    np.testing.assert_allclose(named.pooled(rows)["max"], pooled["max"][:, [11]], atol=1e-5)


def test_what_is_no_autoencoder_of_this_model_is_refused(tmp_path, monkeypatch):
    folder, _ = autoencoder(tmp_path / "sae", "blocks.1.hook_resid_post")
    with pytest.raises(ValueError, match=r"sae: feature: 24; the autoencoder has 24: give 0 to 23"):
        SparseFeatures.read(folder, D_SAE, reference())
    with pytest.raises(ValueError, match=r"sae: .*: give a folder of SAELens, with cfg.json and sae_weights.safetensors"):
        SparseFeatures.read(tmp_path, None, reference())
    with pytest.raises(ValueError, match=r"sae: file: .* cannot be read"):
        SparseFeatures.read(tmp_path / "none", None, reference())
    monkeypatch.setattr(sparse_features, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match=r"feature: 3 rollouts × 24 features × 2 reductions take .*; name the feature"):
        SparseFeatures.read(folder, None, reference()).pooled([np.zeros((2, HIDDEN_SIZE), np.float32)] * 3)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, "d_in": 7}))
    with pytest.raises(ValueError, match=r"sae: cfg.json: d_in: 7; the model's hidden size is 32"):
        SparseFeatures.read(folder, None, reference())
