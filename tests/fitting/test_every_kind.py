"""Every kind of probe at every hook: fitted, written, verified when it is loaded, and served as it was fitted."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from foreign_autoencoders import autoencoder
from made_rollouts import labelled, readable, reference
from models import tiny_model

from probescore_probes import read_probe_file
from probescore_probes.fitting import pooling_kinds, smoothed_kinds, token_kinds
from probescore_probes.fitting.activation_pass import FINAL_NORM, read_activations, read_tokens
from probescore_probes.fitting.cross_validation import Candidate, Labels
from probescore_probes.fitting.kinds import KINDS, fit_kind
from probescore_probes.fitting.labelled_rollouts import tokenised
from probescore_probes.fitting.linear_kinds import LINEAR_KINDS
from probescore_probes.fitting.serving import BOUND, agreement, write
from probescore_probes.fitting.sparse_features import SAE_FEATURE, SparseFeatures
from probescore_server.engine.engine import Engine
from probescore_server.probes.format.manifest import Training

HOOKS = ("resid_pre", "resid_post", "attn_out", "mlp_out", "final_norm")
IN_EVERY_RUN = ("attn_out", "final_norm")  # the others are for the sweep: what kinds do does not depend on the hook
REDUCTIONS = {
    "exponential-smoothing": "ema_max(0.1)",
    "softmax-pooling": "softmax_mean(1)",
    **dict.fromkeys(("mlp", "mean-of-sigmoids", "attention", "rolling-max")),  # pool inside their graphs
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """For a hook: the fitted scores of every kind, the scores that an engine serves from the files of all of them, and the files."""

    @functools.cache
    def of_hook(hook):
        folder = tmp_path_factory.mktemp(hook)
        taps = (hook,) if hook == FINAL_NORM else (f"{hook}.1", f"{hook}.2")
        engine = Engine.load(str(tiny_model()), taps=[*taps, FINAL_NORM])
        examples = tokenised(labelled(readable(48)), engine)
        table = read_activations(engine, reference(), examples, taps, ("mean", "last"))
        name = "model.norm" if hook == FINAL_NORM else f"blocks.1.hook_{hook}"
        sparse = SparseFeatures.read(autoencoder(folder / "sae", name)[0], None, reference())
        table.tokens.update(read_tokens(engine, examples, taps))
        table.features.update(sparse.pooled(table.tokens[taps[0]]))
        labels = Labels(np.array([each.positive for each in examples]), np.arange(48), np.ones(48))
        fits = {}
        for kind in KINDS:
            at = Candidate(taps[0], "last" if kind == "lda" else "mean")
            fits[kind] = fit_kind(kind, table, labels, np.arange(48), at, 0, sparse)
            golden = [examples[index] for index in np.argsort(-fits[kind].score(np.arange(48)))[:4]]
            about = {"name": kind, "version": "1", "label": "made", "expects_bos": True, "training": Training(method=kind)}
            write(folder / f"{kind}.onnx", fits[kind].probe(), reference(), golden, **about)
        files = {kind: folder / f"{kind}.onnx" for kind in KINDS}
        result = Engine.load(str(tiny_model()), list(files.values())).score([each.rollout() for each in examples])
        scores = {kind: np.array([group.completions[0][kind].value for group in result.groups], np.float64) for kind in KINDS}
        return {kind: fits[kind].score(np.arange(48)) for kind in KINDS}, scores, files

    return of_hook


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    with pytest.MonkeyPatch.context() as patch:
        for module in (token_kinds, smoothed_kinds, pooling_kinds):
            patch.setattr(module, "_STEPS", 30)
        yield


@pytest.mark.parametrize("hook", [hook if hook in IN_EVERY_RUN else pytest.param(hook, marks=pytest.mark.sweep) for hook in HOOKS])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_at_every_hook_is_served_as_it_was_fitted(kind, hook, served):
    fitted, scores, files = served(hook)
    file = read_probe_file(files[kind])
    assert agreement(fitted[kind], scores[kind], "float32", file).largest <= BOUND["float32"]
    assert fitted[kind].std() > 0
    assert {each.split(".")[0] for each in map(str, (tap.tap for tap in file.manifest.inputs))} == {hook}
    if kind in REDUCTIONS:
        assert file.manifest.reduction == REDUCTIONS[kind]
    else:
        assert file.manifest.reduction in (("mean", "max") if kind == SAE_FEATURE else ("last" if kind == "lda" else "mean",))
        assert kind in (*LINEAR_KINDS, SAE_FEATURE)
