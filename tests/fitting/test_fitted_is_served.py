"""Every kind of probe is served as it was fitted, and every other way to serve it is impossible or refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_rollouts import readable, reference
from models import tiny_model
from test_fitting import labelled

from probescore_probes.fitting import pooling_kinds, token_kinds
from probescore_probes.fitting.activation_pass import FINAL_NORM, read_activations, read_as_served, read_tokens
from probescore_probes.fitting.cross_validation import Candidate, Labels
from probescore_probes.fitting.kinds import KINDS, fit_kind
from probescore_probes.fitting.labelled_rollouts import tokenised
from probescore_probes.fitting.linear_kinds import LINEAR_KINDS
from probescore_probes.fitting.serving import agreement, batch_rounding, serve, served_scores, write
from probescore_probes.fitting.token_kinds import TOKEN_KINDS
from probescore_probes.serve_check import BOUND
from probescore_server.engine.engine import Engine
from probescore_server.errors import ProbeRefused
from probescore_server.probes.format.manifest import Training

TAP = "resid_post.1"
TAPS = ("resid_post.0", TAP)
DTYPE = "bfloat16"


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_kinds, "_STEPS", 40)
        patch.setattr(pooling_kinds, "_STEPS", 40)
        yield


@pytest.fixture(scope="module")
def data():
    """Examples, with their activations as a fit reads them in half precision; in float32 every kind is fitted in ``test_fitting``."""
    engine = Engine.load(str(tiny_model()), taps=[*TAPS, FINAL_NORM], dtype=DTYPE)
    examples = tokenised(labelled(readable(30)), engine)
    table = read_activations(engine, reference(), examples, TAPS, ("mean", "last"))
    table = read_as_served(engine, examples, table, TAPS)
    return examples, replace(table, tokens=tuple(read_tokens(engine, examples, TAP)))


def written(probe, examples, path):
    return write(path, probe, reference(), examples, name="made", version="1", label="made", expects_bos=True, training=Training())


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_served_as_it_was_fitted_and_not_otherwise(kind, data, tmp_path):
    examples, table = data
    labels = Labels(np.array([each.positive for each in examples]), np.arange(len(examples)), np.ones(len(examples)))
    every = np.arange(len(examples))
    pool = "last" if kind in LINEAR_KINDS else "mean"
    fit = fit_kind(kind, table, labels, every, Candidate(TAP, pool), 0)
    probe = fit.probe()
    file = written(probe, examples, tmp_path / "fitted.onnx")
    engine = serve(tiny_model(), tmp_path / "fitted.onnx", dtype=DTYPE, device="cpu")
    served = served_scores(engine, examples)
    assert agreement(fit.score(every), served, DTYPE, file).largest <= BOUND["float32"]  # in any dtype, of the same batches
    assert batch_rounding(engine, examples, served).largest <= BOUND[DTYPE]
    assert file.manifest.reduction == (pool if kind in LINEAR_KINDS else None)
    if kind in LINEAR_KINDS:
        trap = written(replace(probe, reduction="mean"), examples, tmp_path / "trap.onnx")
        otherwise = served_scores(serve(tiny_model(), tmp_path / "trap.onnx", dtype=DTYPE, device="cpu"), examples)
        with pytest.raises(ProbeRefused, match="another function than was fitted"):
            agreement(fit.score(every), otherwise, DTYPE, trap)
    else:  # per token, under any reduction
        with pytest.raises((ProbeRefused, ValueError)):
            written(replace(probe, reduction="mean"), examples, tmp_path / "trap.onnx")
        assert not (tmp_path / "trap.onnx").exists()


def test_kinds_that_are_fitted_on_tokens_are_among_them():
    assert {*TOKEN_KINDS, *LINEAR_KINDS} <= {*KINDS}
