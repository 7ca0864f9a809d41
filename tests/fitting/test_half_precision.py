"""Every kind of probe at every hook in bfloat16: how far served scores of rollouts and of tokens are from the fitted ones.

What moves them is the rounding of the model, which differs with what else is in a batch. Read in the same batches, nothing is left but the
probe's own float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pytest
from foreign_autoencoders import autoencoder
from made_rollouts import labelled, readable, reference
from models import tiny_model

from probescore_probes.fitting import pooling_kinds, smoothed_kinds, token_kinds
from probescore_probes.fitting.activation_pass import FINAL_NORM, read_activations, read_as_served, read_tokens
from probescore_probes.fitting.cross_validation import Candidate, Labels
from probescore_probes.fitting.kinds import KINDS, fit_kind
from probescore_probes.fitting.labelled_rollouts import tokenised
from probescore_probes.fitting.linear_kinds import LINEAR_KINDS
from probescore_probes.fitting.serving import BOUND, serve, write
from probescore_probes.fitting.smoothed_kinds import SMOOTHED_KINDS
from probescore_probes.fitting.sparse_features import SAE_FEATURE, SparseFeatures
from probescore_server.engine.engine import Engine
from probescore_server.probes.format.manifest import Training

HOOKS = ("resid_pre", "resid_post", "attn_out", "mlp_out", "final_norm")
DTYPE = "bfloat16"
COUNT = 48
PER_TOKEN = 0.08
"""Limits the 99th percentile of how far a token's score moves, in standard deviations of the scores of tokens."""
SCORES_TOKENS = {*LINEAR_KINDS, *SMOOTHED_KINDS, SAE_FEATURE}
AS_PRECISE_AS_THE_STREAM = ("resid_pre", "resid_post")
"""Hooks where a file's scores in bfloat16 and in float32 agree within the bounds too. In a single block's term, or beyond the final norm,
rounding is larger beside the scores, above all where one token decides: benchmarks/results has the numbers."""
IN_EVERY_RUN = [("resid_post", "logistic"), ("resid_post", "exponential-smoothing")]


@dataclass(frozen=True, eq=False)
class Moved:
    """Differences of scores, in standard deviations: of rollouts ``(n,)``, and of all their tokens ``(tokens,)``, or ``None`` for a kind
    that does not score tokens.
    """

    rollouts: np.ndarray
    tokens: np.ndarray | None

    @classmethod
    def between(cls, found, expected):
        values = [np.array([one.value for one in scores]) for scores in (found, expected)]
        if found[0].tokens is None:
            return cls(apart(*values), None)
        return cls(apart(*values), apart(*(np.concatenate([one.tokens[:, 0] for one in scores]) for scores in (found, expected))))

    @property
    def of_99_tokens(self):
        return 0.0 if self.tokens is None else float(np.quantile(self.tokens, 0.99))

    def __str__(self):
        return f"rollouts {self.rollouts.max():.4f}" + ("" if self.tokens is None else f", tokens p99 {self.of_99_tokens:.4f}")


def apart(found, expected):
    return np.abs(found - expected) / expected.std()


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    with pytest.MonkeyPatch.context() as patch:
        for module in (token_kinds, smoothed_kinds, pooling_kinds):
            patch.setattr(module, "_STEPS", 30)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """For a hook: the examples, their activations as ``fit`` reads them in bfloat16, and an autoencoder of that place."""

    @functools.cache
    def of_hook(hook):
        taps = (hook,) if hook == FINAL_NORM else (f"{hook}.1", f"{hook}.2")
        engine = Engine.load(str(tiny_model()), taps=[*dict.fromkeys((*taps, FINAL_NORM))], dtype=DTYPE)
        examples = tokenised(labelled(readable(COUNT)), engine)
        table = read_activations(engine, reference(), examples, taps, ("mean", "last"))
        table = read_as_served(engine, examples, table, taps)
        table.tokens.update(read_tokens(engine, examples, taps))
        name = "model.norm" if hook == FINAL_NORM else f"blocks.1.hook_{hook}"
        sparse = SparseFeatures.read(autoencoder(tmp_path_factory.mktemp(hook) / "sae", name)[0], None, reference())
        table.features.update(sparse.pooled(table.tokens[taps[0]]))
        return examples, table, sparse, engine

    return of_hook


def scored(engine, examples, kind):
    result = engine.score([example.rollout() for example in examples], token_scores="all")
    return [group.completions[0][kind] for group in result.groups]


@pytest.mark.parametrize(
    ("hook", "kind"),
    [pytest.param(hook, kind, marks=() if (hook, kind) in IN_EVERY_RUN else pytest.mark.sweep) for hook in HOOKS for kind in KINDS],
)
def test_scores_of_rollouts_and_tokens_move_by_no_more_than_is_promised(hook, kind, data, tmp_path):
    examples, table, sparse, reader = data(hook)
    every, tap = np.arange(COUNT), table.taps[0]
    labels = Labels(np.array([each.positive for each in examples]), every, np.ones(COUNT))
    fit = fit_kind(kind, table, labels, every, Candidate(tap, "last" if kind == "lda" else "mean"), 0, sparse)
    probe, fitted = fit.probe(), fit.score(every)
    order = np.argsort(-fitted)
    golden = [examples[index] for index in (*order[:4], *order[-4:])]
    file = tmp_path / "probe.onnx"
    write(file, probe, reference(), golden, name=kind, version="1", label="made", expects_bos=True, training=Training())
    engine = serve(tiny_model(), file, dtype=DTYPE, device="cpu")
    served = scored(engine, examples, kind)
    alone = [scored(engine, [example], kind)[0] for example in examples]
    exact = scored(serve(tiny_model(), file, dtype="float32", device="cpu"), examples, kind)

    assert apart(np.array([one.value for one in served]), fitted).max() <= BOUND[DTYPE if kind == SAE_FEATURE else "float32"]
    if kind in SCORES_TOKENS:
        read = reader.activations([example.rollout() for example in examples], list(probe.taps), pool="tokens")
        own = [np.asarray(probe.function.score({tap: found.tokens[tap] for tap in probe.taps})).ravel() for found in read]
        assert apart(np.concatenate([one.tokens[:, 0] for one in served]), np.concatenate(own)).max() <= BOUND["float32"]

    moved, rounded = Moved.between(alone, served), Moved.between(served, exact)
    print(f"{hook} {kind}: served alone {moved}; from float32 {rounded}")
    assert moved.rollouts.max() <= BOUND[DTYPE]
    assert moved.of_99_tokens <= PER_TOKEN
    if hook in AS_PRECISE_AS_THE_STREAM:
        assert rounded.rollouts.max() <= BOUND[DTYPE]
        assert rounded.of_99_tokens <= PER_TOKEN
