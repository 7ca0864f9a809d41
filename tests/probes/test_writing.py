"""From a fitted probe to a file: onnxruntime gives the author's scores, and what the manifest would promise wrongly is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from models import HIDDEN_SIZE
from onnx import TensorProto, helper
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge, SGDClassifier
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch_probes import AttentionPooling, Decaying, JumpReluFeatures, Mlp, Smoothed, TopKFeature, TwoTaps, WindowedAttention

import probescore_probes
from probescore.types import ScoreUnit, Tap
from probescore_probes import (
    Context,
    FollowUp,
    Tolerance,
    linear_probe,
    onnx_probe,
    read_probe_file,
    sklearn_probe,
    torch_probe,
    write_probe,
)
from probescore_server.errors import ProbeRefused

TAP = "resid_post.1"


@pytest.fixture
def write(reference, rollouts, tmp_path):
    def write(probe, **changes):
        said = {"name": "probe", "version": "1", "taps": [TAP], "golden": rollouts[:3]} | changes
        return write_probe(tmp_path / "probe.onnx", probe, reference, **said)

    return write


def run(probe, inputs) -> np.ndarray:
    session = onnxruntime.InferenceSession(probe.graph, providers=["CPUExecutionProvider"])
    return session.run(["scores"], inputs)[0]


def rows(tokens: int, *names: str, seed: int = 5) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal((tokens, HIDDEN_SIZE)).astype(np.float32) for name in names or (TAP,)}


def direction(labels: int = 1, taps: int = 1) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((labels, taps * HIDDEN_SIZE))


def golden_scores(probe) -> list[np.ndarray]:
    return [np.array(case.scores) for case in probe.manifest.golden.cases]


def test_a_file_is_as_readable_as_any_other_and_stands_alone(write, tmp_path):
    write(linear_probe(direction()[0]))
    other = tmp_path / "other"
    other.touch()
    assert (tmp_path / "probe.onnx").stat().st_mode == other.stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "probe.onnx"]


# --------------------------------------------------------------------------------------------------------------------------- weights


def test_a_direction_is_one_gemm(write):
    probe = write(linear_probe(direction()[0], 0.5))

    x = rows(7)
    assert np.allclose(run(probe, x), x[TAP] @ direction().T + 0.5, atol=1e-5)
    assert [node.op_type for node in onnx.load_from_string(probe.graph).graph.node] == ["Gemm"]
    assert (probe.manifest.output.unit, probe.manifest.reduce_on, probe.manifest.reduction) == (ScoreUnit.LOGIT, ScoreUnit.LOGIT, "mean")


def test_several_labels_over_several_taps_are_concatenated_in_order(write):
    taps = ["resid_post.1", "attn_out.2", "final_norm"]
    probe = write(linear_probe(direction(2, 3), [1, 2], unit=ScoreUnit.VALUE), taps=taps, labels=["a", "b"])

    x = rows(4, *taps)
    assert np.allclose(run(probe, x), np.concatenate(list(x.values()), axis=1) @ direction(2, 3).T + [1, 2], atol=1e-4)
    assert [str(tap) for tap in probe.manifest.taps] == taps


def test_golden_scores_are_the_authors_on_the_completions_tokens(write, reference, rollouts):
    probe = write(linear_probe(direction(), 0.5))

    for (prompt, completion), case, scores in zip(rollouts, probe.manifest.golden.cases, golden_scores(probe), strict=False):
        activations = reference.activations(prompt + completion, [TAP])[Tap("resid_post", 1)].astype(np.float64)
        assert (list(case.prompt_ids), list(case.completion_ids)) == (prompt, completion)
        assert np.allclose(scores, activations[len(prompt) :] @ direction().T + 0.5, atol=1e-9)


def test_golden_scores_of_a_follow_up_are_those_of_its_own_tokens(write, reference, rollouts):
    probe = write(linear_probe(direction()), follow_up=FollowUp(token_ids=(4, 9, 5), text="honest?"))

    prompt, completion = rollouts[0]
    activations = reference.activations([*prompt, *completion, 4, 9, 5], [TAP])[Tap("resid_post", 1)].astype(np.float64)
    assert np.allclose(golden_scores(probe)[0], activations[-3:] @ direction().T)


# ----------------------------------------------------------------------------------------------------------------------------- torch

MODULES = {
    "MLP": (Mlp, {"labels": ["a", "b"]}),
    "JumpReLU features": (JumpReluFeatures, {"labels": ["a", "b"], "taps": ["mlp_out.1"]}),
    "top-k feature": (TopKFeature, {"taps": ["mlp_out.1"]}),
    "windowed attention": (WindowedAttention, {"context": Context(kind="causal", window=5)}),
    "windowed attention that sees the prompt": (WindowedAttention, {"context": Context(kind="causal", window=5, sees_prompt=True)}),
    "smoothing": (Smoothed, {"context": Context(kind="causal")}),
    "attention pooling": (AttentionPooling, {"context": Context(kind="rollout")}),
    "positions": (Decaying, {"positions": True}),
    "two taps": (TwoTaps, {"taps": ["resid_pre.1", "final_norm"]}),
}


@pytest.mark.parametrize("kind", MODULES)
def test_a_torch_module_gives_its_own_scores_for_any_number_of_tokens(write, kind):
    torch.manual_seed(0)
    made, said = MODULES[kind]
    module = made()
    probe = write(torch_probe(module, unit=ScoreUnit.VALUE), **said)
    module.eval()

    for lengths in ([1], [9], [4, 1, 6], [13, 8]):
        inputs = rows(sum(lengths), *map(str, probe.manifest.taps))
        if probe.manifest.cu_seqlens:
            inputs["cu_seqlens"] = np.cumsum([0, *lengths])
        if probe.manifest.positions:
            inputs["positions"] = np.concatenate([np.arange(length) for length in lengths])
        with torch.inference_mode():
            expected = module(*map(torch.from_numpy, inputs.values())).numpy()
        assert np.allclose(run(probe, inputs), expected.reshape(len(expected), -1), atol=1e-5)


def test_the_module_of_the_author_is_left_as_it_was(write):
    module = Mlp().double()

    write(torch_probe(module, unit=ScoreUnit.LOGIT), labels=["a", "b"])

    assert module.training
    assert module.net[0].weight.dtype == torch.float64


def test_nothing_of_the_authors_files_travels_in_the_graph(write):
    probe = write(torch_probe(Mlp(), unit=ScoreUnit.LOGIT), labels=["a", "b"])

    assert b"torch_probes" not in probe.graph
    assert not onnx.load_from_string(probe.graph).graph.value_info
    assert str(Path(__file__).parent).encode() not in probe.graph


# ------------------------------------------------------------------------------------------------------------------------ scikit-learn


@pytest.fixture(scope="module")
def fitted(reference, rollouts):
    x = np.concatenate(reference.completion_activations(rollouts, TAP))
    noise = np.random.default_rng(0).standard_normal(len(x))
    return x, x[:, 0] + 0.5 * noise > 0, np.digitize(x[:, 1] + 0.5 * noise, [-1, 1]), x[:, 2] + 0.1 * noise


LINEAR = {
    "logistic regression": (LogisticRegression(), ScoreUnit.LOGIT),
    "standardised logistic regression": (make_pipeline(StandardScaler(), LogisticRegression()), ScoreUnit.LOGIT),
    "scaled, not centred": (make_pipeline(StandardScaler(with_mean=False), LogisticRegression()), ScoreUnit.LOGIT),
    "centred, not scaled": (make_pipeline(StandardScaler(with_std=False), LogisticRegression()), ScoreUnit.LOGIT),
    "no intercept": (LogisticRegression(fit_intercept=False), ScoreUnit.LOGIT),
    "stochastic gradient, log loss": (SGDClassifier(loss="log_loss", random_state=0), ScoreUnit.LOGIT),
    "stochastic gradient, hinge": (SGDClassifier(random_state=0), ScoreUnit.VALUE),
    "support vectors": (LinearSVC(), ScoreUnit.VALUE),
}


@pytest.mark.parametrize("kind", LINEAR)
def test_a_binary_linear_classifier_is_a_gemm_of_its_decision_function(write, fitted, kind):
    x, binary, _, _ = fitted
    estimator, unit = LINEAR[kind]
    estimator.fit(x, binary)

    probe = write(sklearn_probe(estimator))

    assert [node.op_type for node in onnx.load_from_string(probe.graph).graph.node] == ["Gemm"]
    assert probe.manifest.output.unit is unit
    assert np.allclose(run(probe, {TAP: x})[:, 0], estimator.decision_function(x), atol=1e-4)


PROBABILISTIC = {
    "standardised MLP": make_pipeline(StandardScaler(), MLPClassifier(hidden_layer_sizes=(8,), max_iter=30, random_state=0)),
    "logistic regression on components": make_pipeline(PCA(5), LogisticRegression()),
    "forest": RandomForestClassifier(5, max_depth=3, random_state=0),
}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("kind", PROBABILISTIC)
def test_any_other_classifier_scores_by_the_probability_of_the_second_class(write, fitted, kind):
    x, binary, _, _ = fitted
    estimator = PROBABILISTIC[kind].fit(x, binary)

    probe = write(sklearn_probe(estimator))

    assert probe.manifest.output.unit is ScoreUnit.PROBABILITY
    assert np.allclose(run(probe, {TAP: x})[:, 0], estimator.predict_proba(x)[:, 1], atol=1e-5)


def test_three_classes_are_three_labels(write, fitted):
    x, _, ternary, _ = fitted
    estimator = LogisticRegression().fit(x, ternary)

    probe = write(sklearn_probe(estimator), labels=["low", "middle", "high"])

    assert np.allclose(run(probe, {TAP: x}), estimator.predict_proba(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(
    "estimator", [Ridge(), MLPRegressor(hidden_layer_sizes=(8,), max_iter=30, random_state=0)], ids=lambda e: type(e).__name__
)
def test_a_regressor_scores_by_its_prediction(write, fitted, estimator):
    x, _, _, target = fitted
    estimator.fit(x, target)

    probe = write(sklearn_probe(estimator))

    assert probe.manifest.output.unit is ScoreUnit.VALUE
    assert np.allclose(run(probe, {TAP: x})[:, 0], estimator.predict(x), atol=1e-4)


def test_an_estimator_over_two_taps_takes_them_side_by_side(write, fitted):
    x, binary, _, _ = fitted
    both = np.concatenate([x, x[::-1]], axis=1)
    estimator = RandomForestClassifier(5, max_depth=3, random_state=0).fit(both, binary)

    probe = write(sklearn_probe(estimator), taps=[TAP, "resid_post.2"])

    assert np.allclose(run(probe, {TAP: x, "resid_post.2": x[::-1]})[:, 0], estimator.predict_proba(both)[:, 1], atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------- a ready graph


def norm_graph(operator: str = "ReduceL2") -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node(operator, [TAP, "axes"], ["scores"], keepdims=1)],
        "norm",
        [helper.make_tensor_value_info(TAP, TensorProto.FLOAT, ["n", HIDDEN_SIZE])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 1])],
        [onnx.numpy_helper.from_array(np.array([1]), "axes")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def norms(inputs) -> np.ndarray:
    return np.linalg.norm(inputs[TAP], axis=1)


def test_a_ready_graph_is_taken_with_the_authors_function(write, tmp_path):
    onnx.save(norm_graph(), tmp_path / "norm.onnx")

    probe = write(onnx_probe(tmp_path / "norm.onnx", norms, unit=ScoreUnit.VALUE))

    x = rows(6)
    assert np.allclose(run(probe, x)[:, 0], norms(x), atol=1e-5)


def test_a_graph_that_is_not_the_authors_function_is_refused(write):
    with pytest.raises(ProbeRefused, match=r"scores off by .* the scores of the author's code"):
        write(onnx_probe(norm_graph("ReduceL1"), norms, unit=ScoreUnit.VALUE))


def test_a_graph_that_fails_on_the_golden_rollouts_is_refused(write):
    graph = norm_graph()
    graph.graph.node[0].CopyFrom(helper.make_node("Gather", [TAP, "beyond"], ["scores"], axis=1))
    graph.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.array([HIDDEN_SIZE]), "beyond"))

    with pytest.raises(ProbeRefused, match="graph: found an error on the golden rollouts"):
        write(onnx_probe(graph, norms, unit=ScoreUnit.VALUE))


def test_a_graph_that_gives_fewer_scores_than_tokens_is_refused(write):
    graph = norm_graph()
    graph.graph.node[0].output[0] = "every"
    graph.graph.node.append(helper.make_node("Compress", ["every", "first"], ["scores"], axis=0))
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array([True]), "first"))

    with pytest.raises(ProbeRefused, match=r"scores of shape \(1, 1\), expected \(6, 1\)"):
        write(onnx_probe(graph, norms, unit=ScoreUnit.VALUE))


# -------------------------------------------------------------------------------------------------------------- promises that do not hold


def test_a_pointwise_promise_of_a_probe_that_reads_neighbours_is_refused(write):
    class Centred(torch.nn.Module):
        def forward(self, x):
            return (x - x.mean(0, keepdim=True))[:, 0]

    with pytest.raises(ProbeRefused, match="do not depend on its neighbours"):
        write(torch_probe(Centred(), unit=ScoreUnit.VALUE))


def test_a_causal_probe_that_ignores_where_sequences_start_is_refused(write):
    class Cumulative(torch.nn.Module):
        def forward(self, x, cu_seqlens):
            return x[:, :1].cumsum(0)

    with pytest.raises(ProbeRefused, match="do not depend on its neighbours"):
        write(torch_probe(Cumulative(), unit=ScoreUnit.VALUE), context=Context(kind="causal"))


def test_a_causal_promise_of_a_probe_that_reads_ahead_is_refused(write):
    class Centred(torch.nn.Module):
        def forward(self, x, cu_seqlens):
            length = cu_seqlens[1:] - cu_seqlens[:-1]
            row = torch.arange(x.shape[0])
            member = ((row >= cu_seqlens[:-1, None]) & (row < cu_seqlens[1:, None])).float()
            mean = (member @ x[:, :1]) / length[:, None]
            return x[:, :1] - member.T @ mean

    with pytest.raises(ProbeRefused, match="does not depend on later tokens"):
        write(torch_probe(Centred(), unit=ScoreUnit.VALUE), context=Context(kind="causal"))


def test_a_window_shorter_than_the_probes_is_refused(write):
    with pytest.raises(ProbeRefused, match=r"context\.window = 3 tokens"):
        write(torch_probe(WindowedAttention(window=5), unit=ScoreUnit.VALUE), context=Context(kind="causal", window=3))


def test_constant_golden_scores_are_refused(write):
    with pytest.raises(ProbeRefused, match="constant scores"):
        write(linear_probe(np.zeros(HIDDEN_SIZE), 1.0))


def test_a_single_golden_score_is_refused(write, rollouts):
    with pytest.raises(ProbeRefused, match="at least 2"):
        write(torch_probe(AttentionPooling(), unit=ScoreUnit.LOGIT), context=Context(kind="rollout"), golden=rollouts[:1])


def test_scores_of_another_number_than_tokens_are_an_error(write):
    with pytest.raises(ValueError, match=r"gave scores \(1, 2\) for 6 tokens"):
        write(onnx_probe(norm_graph(), lambda inputs: np.ones((1, 2)), unit=ScoreUnit.VALUE))


def test_a_width_that_is_not_the_models_is_an_error(write):
    with pytest.raises(ValueError, match=r"shapes|mismatch"):
        write(linear_probe(np.ones(HIDDEN_SIZE + 1)))


# ---------------------------------------------------------------------------------------------------------------------- the manifest


def test_what_the_author_says_is_what_the_manifest_says(write, reference):
    probe = write(
        linear_probe(direction()),
        description="d",
        author="a",
        license="MIT",
        labels=["cheating"],
        reduce_on=ScoreUnit.PROBABILITY,
        reduction="topk_mean(4)",
        expects_bos=False,
        exclude_special_tokens=True,
        tolerance=Tolerance(float32=1e-3),
    )

    manifest = read_probe_file(probe.file).manifest
    assert (manifest.description, manifest.author, manifest.license, manifest.output.labels) == ("d", "a", "MIT", ("cheating",))
    assert (manifest.reduce_on, manifest.reduction, manifest.expects_bos) == (ScoreUnit.PROBABILITY, "topk_mean(4)", False)
    assert manifest.exclude_special_tokens
    assert manifest.golden.tolerance.float32 == 1e-3
    assert manifest.model == reference.reference


def test_a_probe_that_pools_leaves_out_special_tokens_if_it_says_so(write, reference, rollouts):
    eos = reference.tokenizer.eos_token_id
    ended = [(prompt, [*completion, eos]) for prompt, completion in rollouts[:3]]
    torch.manual_seed(0)
    module = AttentionPooling()
    said = {"context": Context(kind="rollout"), "golden": ended}

    kept = write(torch_probe(module, unit=ScoreUnit.LOGIT), **said)
    left_out = write(torch_probe(module, unit=ScoreUnit.LOGIT), version="2", exclude_special_tokens=True, **said)

    prompt, completion = ended[0]
    x = torch.from_numpy(reference.activations(prompt + completion, [TAP])[Tap("resid_post", 1)][len(prompt) :])
    with torch.inference_mode():
        assert np.allclose(golden_scores(kept)[0], module(x, torch.tensor([0, len(x)])), atol=1e-5)
        assert np.allclose(golden_scores(left_out)[0], module(x[:-1], torch.tensor([0, len(x) - 1])), atol=1e-5)


def test_a_rollout_with_nothing_left_to_pool_is_an_error(write, reference, rollouts):
    with pytest.raises(ValueError, match="no token to score"):
        write(
            torch_probe(AttentionPooling(), unit=ScoreUnit.LOGIT),
            context=Context(kind="rollout"),
            exclude_special_tokens=True,
            golden=[*rollouts[:2], ([5, 6], [reference.tokenizer.eos_token_id])],
        )


# ---------------------------------------------------------------------------------------------------------------- what is imported


def test_reading_imports_neither_torch_nor_transformers_nor_onnxruntime():
    code = (
        "import sys; import probescore_server.probes.format.probe_file; from probescore_probes import read_probe_file; "
        "print([name for name in ('torch', 'transformers', 'onnxruntime', 'sklearn', 'scipy') if name in sys.modules])"
    )

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_public_name_is_there():
    for name in probescore_probes.__all__:
        assert getattr(probescore_probes, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'write_prob'"):
        probescore_probes.write_prob  # noqa: B018
