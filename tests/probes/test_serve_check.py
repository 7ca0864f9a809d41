"""What ``write_probe`` serves is what was fitted, of whole rollouts; else it says so, and writes nothing."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from models import HIDDEN_SIZE
from torch import nn

from probescore.reductions import Reduction, reduce_scores
from probescore.types import ScoreUnit
from probescore_probes import Context, ServeCheck, linear_probe, read_probe_file, torch_probe, write_probe
from probescore_probes.serve_check import REDUCTIONS
from probescore_server.errors import ProbeRefused

TAP = "resid_post.1"
LINEAR = np.random.default_rng(3).standard_normal(HIDDEN_SIZE)


class MeanMlp(nn.Module):
    """A perceptron of one row, or of the mean of each rollout's rows where it is given their offsets."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(HIDDEN_SIZE, 16), nn.GELU(), nn.Linear(16, 1))

    def forward(self, x, cu_seqlens=None):
        if cu_seqlens is None:
            return self.net(x)[:, 0]
        row = torch.arange(x.shape[0])
        member = ((row >= cu_seqlens[:-1, None]) & (row < cu_seqlens[1:, None])).to(x.dtype)
        return self.net(member @ x / member.sum(dim=1, keepdim=True))[:, 0]


@pytest.fixture(scope="module")
def rows(reference, rollouts):
    return reference.completion_activations(rollouts, TAP)


@pytest.fixture
def write(reference, rollouts, tmp_path):
    def write(probe, scores, *, rollouts=rollouts, positive=None, dtype="float32", **changes):
        check = ServeCheck(rollouts=rollouts, scores=scores, positive=positive, dtype=dtype)
        said = {"name": "probe", "version": "1", "taps": [TAP], "golden": rollouts[:3], "serve_check": check} | changes
        return write_probe(tmp_path / "probe.onnx", probe, reference, **said)

    return write


def fitted(rows, reduction):
    scores = [(each.astype(np.float64) @ LINEAR)[:, None].astype(np.float32) for each in rows]
    return np.array([reduce_scores(each, Reduction.parse(reduction))[0] for each in scores])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_reduction_that_was_fitted_is_pinned(reduction, rows, write, tmp_path):
    write(linear_probe(LINEAR), fitted(rows, reduction))
    assert read_probe_file(tmp_path / "probe.onnx").manifest.reduction == reduction


def test_another_reduction_than_was_fitted_is_refused_by_the_name_of_the_right_one(rows, write, tmp_path):
    # fitted on the last token, served as the mean: .918 became .703, without a word
    scores = fitted(rows, "last")
    with pytest.raises(ProbeRefused, match=r"another function than was fitted; the fitted scores are those of reduction='last'"):
        write(linear_probe(LINEAR), scores, reduction="mean")
    with pytest.raises(ProbeRefused, match=r"AUROC 0\.\d+ served, 1\.000 fitted"):
        write(linear_probe(LINEAR), scores, reduction="mean", positive=scores > np.median(scores))
    assert list(tmp_path.iterdir()) == []
    write(linear_probe(LINEAR), scores, reduction="last")


def test_a_reduction_beyond_those_that_are_tried_is_taken_as_given(rows, write, tmp_path):
    write(linear_probe(LINEAR), fitted(rows, "topk_mean(2)"), reduction="topk_mean(2)")
    assert read_probe_file(tmp_path / "probe.onnx").manifest.reduction == "topk_mean(2)"


def test_what_is_not_linear_and_was_fitted_on_means_must_pool_in_its_graph(rows, write):
    module = MeanMlp().eval()
    with torch.inference_mode():
        scores = np.array([module(torch.from_numpy(each.mean(axis=0, keepdims=True))).item() for each in rows])
    probe = torch_probe(module, unit=ScoreUnit.LOGIT)
    with pytest.raises(ProbeRefused, match=r"must pool inside its graph: Context\(kind=\"rollout\"\)"):
        write(probe, scores)
    assert write(probe, scores, context=Context(kind="rollout")).manifest.reduction is None
    with pytest.raises(ProbeRefused, match="the scores of the very function that pools"):
        write(probe, scores[::-1], context=Context(kind="rollout"), name="other")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_coarse_dtype_may_round_and_no_more(dtype, rows, write):
    assert write(linear_probe(LINEAR), fitted(rows, "last"), dtype=dtype).manifest.reduction == "last"
    with pytest.raises(ProbeRefused, match="another function than was fitted"):
        write(linear_probe(LINEAR), fitted(rows, "last"), dtype=dtype, reduction="mean", name="other")


def test_scores_of_stored_activations_that_were_rounded_are_a_warning(rows, write, capsys):
    scores = fitted(rows, "mean")
    apart = 0.004 * scores.std() * np.where(np.arange(len(scores)) % 2, 1, -1)
    write(linear_probe(LINEAR), scores + apart)
    assert "a little off the fitted ones" in capsys.readouterr().out
    # one rollout that is another one is no rounding
    scores[4] += 3 * scores.std()
    with pytest.raises(ProbeRefused, match="another function than was fitted"):
        write(linear_probe(LINEAR), scores, name="other")


def test_without_what_serves_a_file_it_says_what_to_install(rows, write, monkeypatch):
    monkeypatch.setitem(sys.modules, "probescore_server.engine.engine", None)
    with pytest.raises(ValueError, match=r"serve_check: what serves a probe file is not installed .* 'probescore\[server\]'"):
        write(linear_probe(LINEAR), fitted(rows, "mean"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scores": [1.0, 2.0]}, "serve_check.scores: 2 for 24 rollouts"),
        ({"scores": np.ones(24)}, "serve_check.scores: not finite, or all the same"),
        ({"positive": [True]}, "serve_check.positive: 1 for 24 rollouts"),
        ({"dtype": "int8"}, "serve_check.dtype: 'int8'; give one of float32, bfloat16, float16"),
        ({"rollouts": [([1], [5])]}, "serve_check.rollouts: 1; give at least two"),
    ],
)
def test_a_check_that_cannot_be_made_is_refused_before_anything_is_computed(changes, says, write, rollouts):
    given = {"scores": np.arange(24.0), **changes}
    with pytest.raises(ValueError, match=says):
        write(linear_probe(LINEAR), given.pop("scores"), golden=rollouts[:3], **given)


def test_it_takes_a_serve_check_and_nothing_else(write):
    with pytest.raises(TypeError, match=r"serve_check: .*give ServeCheck"):
        write(linear_probe(LINEAR), [1.0], serve_check=[1.0])
