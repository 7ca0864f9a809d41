"""The traps of importing: each is refused by name, read right, or noted; and scores from the author's side show what nothing else can."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import onnx
import pytest
import sklearn
import torch
from foreign_probes import (
    CASES,
    D,
    N,
    Read,
    atlas,
    attention_probe,
    hallucination_probe,
    hidden_states_direction,
    lie_detector,
    mass_mean,
    normal,
    onnx_graph,
    plain_direction,
    sae,
    saved,
    sing_probe,
    standardised,
    written,
)
from models import BOS, VOCAB_SIZE
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression

from probescore.types import ScoreUnit, Tap
from probescore_probes import read_probe_file
from probescore_probes.importing import FORMATS, NOT_COMPARED, AuthorScores, import_probe
from probescore_probes.importing.imported import ImportOptions
from probescore_probes.importing.places import read_place
from probescore_probes.importing.registry import format_of
from probescore_probes.importing.source import ProbeSource
from probescore_server.errors import ProbeRefused

DOCS = Path(__file__).parents[2] / "docs/how-to/import-a-probe.md"
random = np.random.default_rng(5)
GOLDEN = [([BOS, *random.integers(4, VOCAB_SIZE, 4).tolist()], random.integers(4, VOCAB_SIZE, 12).tolist()) for _ in range(3)]


@pytest.fixture
def imported(reference, tmp_path):
    def imported(case, **told):
        said = {"name": "imported", "version": "1", "output": tmp_path / "imported.onnx", "golden": GOLDEN} | case.told | told
        return import_probe(case.file, reference, **{key: value for key, value in said.items() if value is not None})

    return imported


@pytest.fixture
def refused(imported, tmp_path):
    """What an import says that is not to be."""

    def refused(case, kind: type[Exception] = ValueError, **told) -> str:
        with pytest.raises(kind) as caught:
            imported(case, **told)
        message = str(caught.value)
        assert not (tmp_path / "imported.onnx").exists()
        assert "Traceback" not in message
        assert "\n" not in message
        return message

    return refused


def read(case, **told):
    """As an import reads a file, before anything is computed."""
    said = case.told | told
    taps = tuple(read_place(tap, "tap", N).tap for tap in said.pop("taps", ()))
    features = tuple(said.pop("features", ()))
    return format_of(ProbeSource(case.file), said.pop("format", None)).read(
        ProbeSource(case.file), ImportOptions(D, N, taps=taps, features=features, **said)
    )


def make(kind, tmp_path: Path):
    return kind(tmp_path, np.random.default_rng(3))


# --------------------------------------------------------------------------------------------------------------------------- places

PLACES = {
    "resid_post.2": "resid_post.2",
    "hidden_states[0]": "resid_pre.0",
    "hidden_states[1]": "resid_post.0",
    f"hidden_states[{N - 1}]": f"resid_post.{N - 2}",
    f"hidden_states[{N}]": "final_norm",
    "hidden_states[-1]": "final_norm",
    "hidden_states[-2]": f"resid_post.{N - 2}",
    "blocks.1.hook_resid_post": "resid_post.1",
    "blocks.1.hook_resid_pre": "resid_pre.1",
    "blocks.1.hook_attn_out": "attn_out.1",
    "blocks.1.hook_mlp_out": "mlp_out.1",
    "model.layers[1].output[0]": "resid_post.1",
    "model.model.layers[3].output": "resid_post.3",
    "transformer.h[0].input": "resid_pre.0",
    "model.layers.2": "resid_post.2",
    "model.norm.output": "final_norm",
}


@pytest.mark.parametrize("name", PLACES)
def test_a_name_of_another_library_is_the_right_tap(name):
    assert str(read_place(name, "tap", N).tap) == PLACES[name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"hidden_states[{N + 1}]", f"entries 0 to {N}"),
        ("blocks.1.attn.hook_z", "inside a block"),
        ("blocks.1.hook_resid_mid", "inside a block"),
        ("blocks.9.hook_resid_post", "counted from 0"),
        ("ln_final.hook_normalized", "no tap reads there"),
        ("model.layers[1].self_attn.output[0]", "attn_out.1"),
        ("resid_post", "a layer"),
        ("residual.3", "no such tap"),
    ],
)
def test_a_name_where_nothing_can_be_read_is_refused_with_what_can(name, said):
    with pytest.raises(ValueError, match="tap: ") as caught:
        read_place(name, "tap", N)
    assert said in str(caught.value)


def test_a_name_of_transformer_lens_is_noted_since_its_models_are_changed(imported, tmp_path):
    made = imported(make(plain_direction, tmp_path), taps=["blocks.1.hook_resid_post"])
    assert any("centres" in note and "BOS" in note for note in made.notes)


def test_the_last_hidden_state_is_not_the_last_blocks_output(tmp_path):
    assert read(make(hidden_states_direction(N), tmp_path)).taps == (Tap("final_norm"),)


def test_a_row_for_each_layer_is_no_row_for_each_label(refused, tmp_path):
    case = make(hidden_states_direction(2), tmp_path)
    assert "a row for each layer, or for each label?" in refused(case, format="direction", taps=["resid_post.1"])


# ------------------------------------------------------------------------------------------------------------------- what files hold


def test_a_file_is_known_by_what_is_in_it(tmp_path):
    known = {
        "direction in npy": "direction",
        "column in npz, entry of hidden_states": "direction",
        "module in bfloat16, TransformerLens' name": "direction",
        "weight, bias, mean, std": "standardised",
        "hallucination probe": "hallucination-probes",
        "lie detector: perceptron": "lie-detectors",
        "SAELens 5, topk": "saelens",
        "scikit-learn by joblib": "sklearn",
        "ONNX": "onnx",
        "EleutherAI's attention probe with an MLP": "attention-probes",
        "rl-rewardhacking, mass mean": "rl-rewardhacking",
        "rl-rewardhacking, logistic regression": "rl-rewardhacking",
        "Atlas, attention": "obfuscation-atlas",
        "SingProbe, MLP": "singprobe",
    }
    for index, (name, expected) in enumerate(known.items()):
        folder = tmp_path / str(index)
        folder.mkdir()
        assert format_of(ProbeSource(CASES[name](folder, np.random.default_rng(3)).file), None).name == expected, name


def test_what_no_format_recognises_is_refused_with_the_formats(refused, tmp_path):
    case = make(plain_direction, tmp_path)
    (tmp_path / "notes.txt").write_text("a probe")
    for format, said in ((None, "is not recognised"), ("gguf", "'gguf'")):
        message = refused(type(case)(tmp_path / "notes.txt", case.scores), format=format)
        assert said in message
        assert all(known.name in message for known in FORMATS)


@pytest.mark.parametrize("adapter", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("kind", ["direction in npy", "SingProbe, MLP", "lie detector: logistic regression"])
def test_an_adapter_beside_a_probe_whose_format_has_none_is_refused_by_name(refused, tmp_path, kind, adapter):
    case = make(CASES[kind], tmp_path)
    written(tmp_path / adapter, {"peft_type": "LORA"})
    message = refused(case)
    assert message.startswith(f"{adapter}: ")
    assert "changes the model" in message
    assert "write_probe(…, adapter=…)" in message


@pytest.mark.parametrize(
    ("adapter", "problem"),
    [
        ("adapter_config.json", "adapter: adapter_model.safetensors is not there"),
        ("adapter_model.safetensors", "adapter: adapter_config.json is not there"),
        ("adapter_model.bin", "adapter: adapter_model.bin may be a pickle"),
    ],
)
def test_half_an_adapter_beside_a_hallucination_probe_is_refused(refused, tmp_path, adapter, problem):
    case = make(hallucination_probe, tmp_path)
    written(tmp_path / adapter, {"peft_type": "LORA"})
    assert problem in refused(case)


def test_an_adapter_is_not_passed_by_asking_for_another_format(refused, tmp_path):
    case = make(hallucination_probe, tmp_path)
    written(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    head = type(case)(tmp_path / "probe_head.bin", case.scores)
    assert refused(head, format="direction", taps=["resid_post.2"]).startswith("adapter_config.json: ")


def _with_more(file: Path, **more: torch.Tensor) -> None:
    if file.suffix == ".safetensors":
        save_file(load_file(file) | more, file)
        return
    content = ProbeSource(file).content
    saved(file, content | {"state_dict": content["state_dict"] | more} if "state_dict" in content else content | more)


@pytest.mark.parametrize(
    ("kind", "file", "part"),
    [
        ("hallucination probe", "probe_head.bin", "mlp.weight"),
        ("lie detector: perceptron", "probe.pt", "net.4.weight"),
        ("lie detector: logistic regression", "probe.pt", "net.0.weight"),
        ("lie detector: difference of means", "probe.pt", "dataset_mean"),
        ("weight, bias, mean, std", "probe.pt", "eps"),
        ("SAELens 6, standard", "sae_weights.safetensors", "threshold"),
        ("SAELens 6, JumpReLU, layer norm", "sae_weights.safetensors", "r_mag"),
        ("SingProbe, attention", "model.safetensors", "attn_layer.weight"),
        ("Atlas, quadratic", "layer_1/model.pt", "mlp.0.weight"),
        ("Atlas, nonlinear, last layer", f"layer_{N - 1}/model.pt", "mlp.6.weight"),
        ("Atlas, transformer", "layer_1/model.pt", "transformer.layers.0.norm3.weight"),
        ("Atlas, transformer, gelu, norms last", "layer_1/model.pt", "transformer.norm.weight"),
    ],
)
def test_a_part_that_its_formula_does_not_have_is_refused_by_name(refused, tmp_path, kind, file, part):
    """With it, the author's code computes something else."""
    case = make(CASES[kind], tmp_path)
    _with_more(tmp_path / file, **{part: torch.ones(4)})
    assert part.rpartition(".")[0] in refused(case)


@pytest.mark.parametrize("name", ["probe_head.bin", "probe_config.json"])
def test_a_file_of_several_stands_for_its_folder(tmp_path, name):
    case = make(hallucination_probe, tmp_path)
    assert read(type(case)(tmp_path / name, case.scores)).taps == (Tap("resid_post", 2),)


@pytest.mark.parametrize(("change", "said"), [({"hidden_size": 4096}, "hidden_size: 4096"), ({"layer_idx": N}, "counted from 0")])
def test_a_probe_of_another_model_is_refused(refused, tmp_path, change, said):
    case = make(hallucination_probe, tmp_path)
    config = json.loads((tmp_path / "probe_config.json").read_text())
    written(tmp_path / "probe_config.json", config | change)
    assert said in refused(case)


def test_a_tap_that_contradicts_the_file_is_refused(refused, tmp_path):
    assert "probe_config.json says resid_post.2" in refused(make(hallucination_probe, tmp_path), taps=["resid_post.1"])


def test_a_layer_without_a_convention_is_asked_for_with_both_readings(refused, tmp_path):
    message = refused(make(lie_detector("lr"), tmp_path), taps=None)
    assert "resid_post.2 if that is a block counted from 0" in message
    assert "resid_post.1 if it is hidden_states[2]" in message


def test_a_pickled_enum_is_read_by_a_stand_in_and_a_threshold_is_a_note(imported, tmp_path):
    made = imported(make(lie_detector("lr"), tmp_path))
    assert any("ProbeArchitecture" in note for note in made.notes)
    assert any("threshold of 1.25" in note and "calibrate" in note for note in made.notes)
    assert made.probe.manifest.calibrations == ()


def test_a_file_of_old_torch_is_read_too(tmp_path):
    case = make(standardised, tmp_path)
    content = torch.load(case.file, weights_only=True)
    torch.save(content, case.file, _use_new_zipfile_serialization=False)
    assert read(case).method == "a linear probe over standardised activations"


class _Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("format", [None, "lie-detectors", "standardised", "direction"])
def test_no_code_of_a_torch_file_is_run(refused, tmp_path, format):
    case = make(plain_direction, tmp_path)
    file = saved(tmp_path / "evil.pt", {"weight": torch.ones(D), "state_dict": {}, "hyperparams": _Runs(tmp_path / "ran")})
    refused(type(case)(file, case.scores, case.told), format=format)
    assert not (tmp_path / "ran").exists()


def test_a_whole_module_is_refused_with_what_to_save(refused, tmp_path):
    case = make(plain_direction, tmp_path)
    file = saved(tmp_path / "module.pt", torch.nn.Linear(D, 1))
    message = refused(type(case)(file, case.scores, case.told))
    assert "torch.nn.modules.linear.Linear" in message
    assert "state_dict()" in message


@pytest.mark.parametrize("name", ["d.pt", "d.npy", "d.npz", "d.safetensors", "d.onnx"])
def test_a_damaged_file_is_refused(refused, tmp_path, name):
    case = make(plain_direction, tmp_path)
    whole = {"d.pt": CASES["weight, bias, mean, std"], "d.npz": CASES["column in npz, entry of hidden_states"], "d.onnx": onnx_graph}
    whole |= {"d.npy": plain_direction, "d.safetensors": CASES["matrix in safetensors, nnsight's name"]}
    content = make(whole[name], tmp_path).file.read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    refused(type(case)(tmp_path / name, case.scores, case.told))


@pytest.mark.parametrize("suffix", [".pkl", ".joblib", ".lgprobe"])
def test_a_pickle_is_opened_only_if_it_is_trusted_and_says_what_it_names(refused, tmp_path, suffix):
    case = make(plain_direction, tmp_path)
    file = tmp_path / f"probe{suffix}"
    file.write_bytes(pickle.dumps({1: _Runs(tmp_path / "ran")}))
    message = refused(type(case)(file, case.scores, case.told))
    assert "runs code as it is opened" in message
    assert "mkdir" in message
    assert "--trust-pickle" in message
    assert not (tmp_path / "ran").exists()
    refused(type(case)(file, case.scores, case.told), trust_pickle=True)
    assert (tmp_path / "ran").exists()


def test_warnings_of_an_estimators_version_are_notes(imported, tmp_path):
    x = normal(np.random.default_rng(0), 40, D)
    file = tmp_path / "old.joblib"
    joblib.dump(LogisticRegression().fit(x, x[:, 0] > 0), file)
    written_by = sklearn.__version__.encode()
    file.write_bytes(file.read_bytes().replace(written_by, b"0" * len(written_by)))
    case = make(plain_direction, tmp_path)
    made = imported(type(case)(file, case.scores), taps=["resid_post.1"], trust_pickle=True)
    assert any("Trying to unpickle" in note for note in made.notes)
    assert any("whose code was run: sklearn." in note for note in made.notes)


def test_skops_is_read_without_trust(imported, tmp_path):
    skops_io = pytest.importorskip("skops.io")
    x = normal(np.random.default_rng(0), 40, D)
    skops_io.dump(LogisticRegression().fit(x, x[:, 0] > 0), tmp_path / "probe.skops")
    case = make(plain_direction, tmp_path)
    assert imported(type(case)(tmp_path / "probe.skops", case.scores), taps=["resid_post.1"]).format == "sklearn"


def test_a_standard_deviation_is_taken_as_it_is_saved_and_never_0(imported, refused, tmp_path):
    case = make(standardised, tmp_path)
    content = torch.load(case.file, weights_only=True)
    content["std"][4] = 0.0
    torch.save(content, case.file)
    message = refused(case)
    assert "0 at column 4" in message
    assert "eps" in message


@pytest.mark.parametrize("rows", [7, 200])
def test_a_standard_deviation_of_another_ddof_is_found_by_its_authors_scores(refused, tmp_path, reference, rows):
    """Off by 8% of 7 rows, and by 0.25% of 200: less than half precision is, but the same everywhere."""
    case = make(standardised, tmp_path)
    content = {name: tensor.double().numpy() for name, tensor in torch.load(case.file, weights_only=True).items()}
    std = content["std"] * np.sqrt((rows - 1) / rows)
    given = author_scores(reference, GOLDEN, content["weight"][0] / std, "resid_post.3", change=lambda x: x - content["mean"])
    given = [AuthorScores(one.prompt_ids, one.completion_ids, one.token_scores + content["bias"]) for one in given]
    message = refused(case, ProbeRefused, author_scores=given)
    assert "scale" in message if rows == 7 else "1.0025 times" in message
    assert rows == 7 or "ddof" in message


def test_an_eps_that_its_author_added_is_found_by_his_scores(refused, tmp_path, reference):
    case = make(standardised, tmp_path)
    content = {name: tensor.double().numpy() for name, tensor in torch.load(case.file, weights_only=True).items()}
    content["std"][:8] = 1e-4
    saved(case.file, {name: torch.tensor(array).float() for name, array in content.items()})
    given = author_scores(reference, GOLDEN, content["weight"][0] / (content["std"] + 1e-4), "resid_post.3")
    assert "author_scores" in refused(case, ProbeRefused, author_scores=given)


def test_flattened_layers_are_asked_for_each(refused, tmp_path):
    case = CASES["vllm-lens"](tmp_path, np.random.default_rng(3))
    assert "which 2 taps it reads" in refused(case, taps=None)
    assert "give 2" in refused(case, taps=["resid_post.1"])
    assert "resid_post.N" in refused(case, taps=["resid_pre.1", "resid_post.2"])


def test_texts_that_the_tokenizer_makes_nothing_of_are_no_golden_rollouts(refused, tmp_path):
    assert "give a few real rollouts" in refused(make(plain_direction, tmp_path), golden=None)


# ------------------------------------------------------------------------------------------------------------------------------ SAELens

SAE_REFUSALS = {
    "not folded": ({"normalize_activations": "expected_average_only_in"}, "fold it into the weights"),
    "whitened": ({"normalize_activations": "covariance_whitening"}, "fold it into the weights"),
    "heads side by side": ({"reshape_activations": "hook_z"}, "no tap reads there"),
    "gated": ({"architecture": "gated"}, "'gated'"),
    "a transcoder": ({"architecture": "transcoder"}, "torch_probe"),
    "tanh": ({"activation_fn": "tanh-relu"}, "only relu and topk"),
    "one head": ({"hook_head_index": 3}, "reads one head"),
    "another width": ({"d_in": 768}, "d_in: 768"),
    "another shape": ({"d_sae": 23}, "W_enc: shape"),
}


@pytest.mark.parametrize("kind", SAE_REFUSALS)
def test_a_sparse_autoencoder_that_cannot_be_served_right_is_refused(refused, tmp_path, kind):
    case = make(sae(6, "standard"), tmp_path)
    change, said = SAE_REFUSALS[kind]
    written(tmp_path / "cfg.json", json.loads((tmp_path / "cfg.json").read_text()) | change)
    assert said in refused(case)


@pytest.mark.parametrize("hook", ["blocks.1.attn.hook_z", "blocks.1.ln2.hook_normalized", "blocks.1.hook_resid_mid"])
@pytest.mark.parametrize("version", [5, 6])
def test_a_sparse_autoencoder_that_reads_elsewhere_is_refused(refused, tmp_path, hook, version):
    case = make(sae(version, "standard"), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (config["metadata"] if version == 6 else config)["hook_name"] = hook
    written(tmp_path / "cfg.json", config)
    assert hook in refused(case)


@pytest.mark.parametrize("key", ["apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "prepend_bos"])
@pytest.mark.parametrize("value", ["false", 0, "no", [], 1])
def test_what_is_neither_true_nor_false_is_not_taken_for_either(refused, tmp_path, key, value):
    case = make(sae(6, "topk"), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (config["metadata"] if key == "prepend_bos" else config)[key] = value
    written(tmp_path / "cfg.json", config)
    assert f"{key}: " in refused(case)


@pytest.mark.parametrize("k", [0, -1, 25, 10**9, None, "6"])
def test_the_number_of_features_that_topk_keeps_is_checked(refused, tmp_path, k):
    case = make(sae(6, "topk"), tmp_path)
    written(tmp_path / "cfg.json", json.loads((tmp_path / "cfg.json").read_text()) | {"k": k})
    assert "cfg.json: k: " in refused(case)


def test_a_layer_norm_divides_by_the_unbiased_deviation_and_then_adds_its_eps(tmp_path):
    """As torch's ``std`` does and ``nn.LayerNorm`` does not: seen where activations are as small as the eps."""
    function = read(make(sae(6, "standard", "layer_norm"), tmp_path)).function
    weights = {name: array.double().numpy() for name, array in load_file(tmp_path / "sae_weights.safetensors").items()}
    x = normal(np.random.default_rng(8), 5, D) * 1e-5
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / (x.std(-1, ddof=1, keepdims=True) + 1e-5)
    others = {"biased": centred / (x.std(-1, keepdims=True) + 1e-5), "inside": centred / np.sqrt(x.var(-1, ddof=1, keepdims=True) + 1e-5)}
    found = function.score({"resid_post.1": x.astype(np.float32)})

    def features(rows):
        return np.maximum((rows - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"], 0)[:, [3, 11]]

    assert np.allclose(found, features(expected), rtol=1e-4, atol=1e-4)
    for wrong in others.values():
        assert not np.allclose(found, features(wrong), rtol=1e-3, atol=1e-3)


def test_version_5_normalised_by_true_is_the_average_that_is_not_in_the_file(refused, tmp_path):
    case = make(sae(5, "standard"), tmp_path)
    written(tmp_path / "cfg.json", json.loads((tmp_path / "cfg.json").read_text()) | {"normalize_activations": True})
    assert "expected_average_only_in" in refused(case)


@pytest.mark.parametrize(
    ("version", "prepend_bos", "expects"), [(5, True, True), (6, True, True), (6, False, False), (5, None, True), (6, None, None)]
)
def test_prepend_bos_is_expects_bos(refused, tmp_path, version, prepend_bos, expects):
    case = make(sae(version, "standard"), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    place = config["metadata"] if version == 6 else config
    place.pop("prepend_bos")
    place |= {} if prepend_bos is None else {"prepend_bos": prepend_bos}
    written(tmp_path / "cfg.json", config)
    without = [(prompt[1:], completion) for prompt, completion in GOLDEN]
    if expects:
        assert "does not begin with BOS" in refused(case, golden=without)
    assert read(case).expects_bos is expects


def test_centred_weights_are_centred_rows_of_models_with_layer_norms(tmp_path):
    """As SAELens loads GPT-2 for some of its releases."""
    case = make(sae(6, "standard"), tmp_path)
    x = normal(np.random.default_rng(8), 5, D).astype(np.float32)
    plain = read(case).function.score({"resid_post.1": x})
    config = json.loads((tmp_path / "cfg.json").read_text())
    config["metadata"]["model_from_pretrained_kwargs"] = {"center_writing_weights": True}
    written(tmp_path / "cfg.json", config)

    found = {norms: read(case, layer_norms=norms) for norms in (True, False)}

    centred = read(case, layer_norms=True).function.score({"resid_post.1": x})
    by_hand = read(make(sae(6, "standard"), tmp_path)).function.score({"resid_post.1": x - x.mean(-1, keepdims=True)})
    assert np.allclose(centred, by_hand, atol=1e-5)
    assert not np.allclose(centred, plain, atol=1e-2)
    assert np.array_equal(found[False].function.score({"resid_post.1": x}), plain)
    assert any("taken out" in note for note in found[True].notes)
    assert any("does nothing" in note for note in found[False].notes)


@pytest.mark.parametrize(("kind", "nonlinear"), [(lie_detector("mlp"), True), (lie_detector("lr"), False), (onnx_graph, True)])
def test_what_may_have_been_fitted_on_means_is_noted_where_it_matters(tmp_path, kind, nonlinear):
    notes = read(make(kind, tmp_path)).notes
    assert any("mean activation" in note for note in notes) is nonlinear


def test_features_are_asked_for_and_must_fire(refused, tmp_path):
    case = make(sae(6, "jumprelu"), tmp_path)
    assert "the autoencoder has 24" in refused(case, features=None)
    assert "feature: 24" in refused(case, features=[24])
    file = tmp_path / "sae_weights.safetensors"
    weights = load_file(file)
    weights["threshold"][3] = 1e6
    save_file(weights, file)
    message = refused(case)
    assert "feature_3 is 0 on all" in message
    assert "--golden" in message


# ----------------------------------------------------------------------------------------------------------------- attention and others


@pytest.mark.parametrize("kind", ["AttentionProbe", "TransformerProbe"])
def test_the_number_of_heads_is_never_taken_from_the_file(refused, tmp_path, kind):
    case = make(atlas(kind, "last"), tmp_path)
    assert "not to be relied on" in refused(case, heads=None)
    assert "give one that divides" in refused(case, heads=7)


@pytest.mark.parametrize("stated", [None, 3, 5])
def test_a_window_that_contradicts_the_mask_in_the_file_is_refused(refused, tmp_path, stated):
    case = make(atlas("AttentionProbe", "last"), tmp_path)
    config = json.loads((case.file / "config.json").read_text())
    config["init_args"]["sliding_window"] = stated
    written(case.file / "config.json", config)
    assert "lets a token see 4" in refused(case)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_activations_cannot_be_divided_by_is_refused(refused, tmp_path, scale):
    case = make(atlas("LinearProbe", "last", "unit_norm"), tmp_path)
    saved(case.file / "model.pt", torch.load(case.file / "model.pt", weights_only=True) | {"input_scale": torch.tensor(scale)})
    assert "input_scale" in refused(case)


def test_a_folder_that_does_not_say_its_layer_is_asked_for_it(refused, tmp_path):
    case = make(atlas("LinearProbe", "last"), tmp_path)
    case.file.rename(tmp_path / "probe")
    assert "give hidden_states[K + 1]" in refused(type(case)(tmp_path / "probe", case.scores, case.told))


def test_an_aggregator_is_asked_for(refused, tmp_path):
    case = make(atlas("GDMProbe"), tmp_path)
    for wrong in (None, "median", "rolling_attention(0)"):
        message = refused(case, reduction=wrong)
        assert "rolling_attention(10)" in message


def test_platts_line_must_survive_the_aggregator(refused, tmp_path):
    case = make(atlas("LinearProbe", "sum"), tmp_path)
    assert "platt_B" in refused(case)
    content = torch.load(case.file / "model.pt", weights_only=True)
    torch.save(content | {"platt_A": torch.tensor(-1.0)}, case.file / "model.pt")
    assert "platt_A" in refused(case, reduction="max")


def test_the_last_layer_of_the_atlas_is_after_the_final_norm(tmp_path):
    assert read(make(atlas("LinearProbe", layer=N - 1), tmp_path)).taps == (Tap("final_norm"),)


def test_sing_probe_reads_what_enters_a_block_and_identity_holds_nothing(refused, tmp_path):
    case = make(sing_probe("mlp"), tmp_path)
    found = read(case)
    assert [str(tap) for tap in found.taps] == ["resid_pre.1", "resid_pre.3"]
    assert found.labels == ("risk", "unsafe")
    assert found.reduce_on is ScoreUnit.PROBABILITY
    written(tmp_path / "config.json", json.loads((tmp_path / "config.json").read_text()) | {"model_type": "sing_probe_identity"})
    assert "holds no weights" in refused(case)


def test_entries_of_hidden_states_that_a_file_has_no_probe_for_are_refused(refused, tmp_path):
    case = make(mass_mean, tmp_path)
    assert "hidden_states[1], hidden_states[2], hidden_states[4]" in refused(case, taps=None)
    assert "hidden_states[3]" in refused(case, taps=["resid_post.2"])


def test_thresholds_beside_a_probe_are_a_note_and_no_calibration(imported, tmp_path):
    made = imported(make(mass_mean, tmp_path))
    assert any("strict_threshold" in note and "calibrate" in note for note in made.notes)
    assert made.probe.manifest.calibrations == ()


def _by_layer(file: Path, dump: Any) -> Path:
    x = normal(np.random.default_rng(0), 60, D)
    with file.open("wb") as opened:
        dump({0: None} | {layer: LogisticRegression().fit(x, x[:, layer] > 0) for layer in (1, 3)}, opened)
    written(file.parent / "probe_rh_summary_stats.json", {"strict_threshold": 0.3, "loose_threshold": 0.1, "strict_roc_auc_score": 0.9})
    return file


@pytest.mark.parametrize("library", ["pickle", "dill"])
def test_classifiers_by_layer_are_read_by_their_entry_and_layers_that_were_not_fitted_are_refused(refused, imported, tmp_path, library):
    case = make(plain_direction, tmp_path)
    case = type(case)(_by_layer(tmp_path / "strict.lgprobe", pytest.importorskip(library).dump), case.scores)
    assert "hidden_states[1], hidden_states[3]" in refused(case, taps=["hidden_states[0]"], trust_pickle=True)
    assert "resid_post.1, which is hidden_states[2]" in refused(case, taps=["resid_post.1"], trust_pickle=True)
    made = imported(case, taps=["resid_post.2"], trust_pickle=True)
    assert made.format == "rl-rewardhacking"
    assert any("strict_threshold, loose_threshold" in note for note in made.notes)
    assert made.probe.manifest.calibrations == ()


@pytest.mark.parametrize("layers", [None, [1, 2], [1, 2, 2.5], "124", [1, 2, -1], {1: 2}])
def test_directions_without_their_layers_are_refused(refused, tmp_path, layers):
    case = make(mass_mean, tmp_path)
    saved(case.file, torch.load(case.file, weights_only=True) | {"layers": layers})
    assert "layers" in refused(case)


def test_probabilities_of_a_mass_mean_agree_as_its_library_gives_them(imported, refused, tmp_path, reference):
    case = make(mass_mean, tmp_path)
    direction = ProbeSource(case.file).content["direction"][2].double().numpy()
    direction /= 40 * np.linalg.norm(direction)
    saved(case.file, torch.load(case.file, weights_only=True) | {"direction": torch.tensor(np.stack([direction] * 3)).float()})
    given = author_scores(reference, GOLDEN, direction, "final_norm", per_token=False, reduce=lambda t: 1 / (1 + np.exp(-t.mean())))
    made = imported(case, author_scores=given)
    assert "the probability of a reduced value" in made.notes[0]


def test_an_attention_probe_pools_by_itself(refused, tmp_path):
    case = make(attention_probe(False), tmp_path)
    assert "pools by itself" in refused(case, reduction="mean")
    found = read(case)
    assert found.context.kind == "rollout"
    assert any("use_tanh" in note for note in found.notes)


# -------------------------------------------------------------------------------------------------------------------------------- ONNX


def test_a_probe_file_is_not_imported_again(imported, refused, tmp_path):
    case = make(onnx_graph, tmp_path)
    imported(case)
    (tmp_path / "imported.onnx").rename(tmp_path / "again.onnx")
    assert "a probe file already" in refused(type(case)(tmp_path / "again.onnx", case.scores, case.told))


def test_graphs_with_other_ends_are_refused(refused, tmp_path):
    case = make(onnx_graph, tmp_path)
    assert "tap: not given" in refused(case, taps=None)
    assert "does not run on rows of 64 numbers" in refused(case, taps=["resid_post.1", "resid_post.2"])
    model = onnx.load(case.file)
    model.graph.output.append(helper.make_tensor_value_info("d", TensorProto.DOUBLE, ["batch", 5]))
    onnx.save(model, case.file)
    assert "of which 2 are tensors of floats" in refused(case)


# ----------------------------------------------------------------------------------------------------------- scores of the author's side


def author_scores(reference, rollouts, w, tap: str, *, per_token: bool = True, change: Any = lambda x: x, reduce: Any = np.mean):
    scores = []
    for prompt, completion in rollouts:
        x = reference.activations([*prompt, *completion], [tap])[next(iter(reference.activations([*prompt, *completion], [tap])))]
        tokens = change(x[len(prompt) :].astype(np.float64)) @ w
        said = {"token_scores": tokens} if per_token else {"score": reduce(tokens)}
        scores.append(AuthorScores(prompt, completion, **said))
    return scores


@pytest.fixture
def direction(tmp_path):
    case = make(plain_direction, tmp_path)
    return case, np.load(case.file).astype(np.float64)


def test_scores_that_agree_are_said_to(imported, direction, reference):
    case, w = direction
    made = imported(case, author_scores=author_scores(reference, GOLDEN, w, "resid_post.1"))
    assert made.agrees
    assert made.notes[0].startswith("Agrees with its author's scores within ")
    assert "36 scores" in made.notes[0]
    assert NOT_COMPARED not in made.probe.manifest.training.notes + made.probe.manifest.description


def test_without_them_the_file_says_so_where_people_look(imported, direction, tmp_path):
    case, _ = direction
    imported(case)
    manifest = read_probe_file(tmp_path / "imported.onnx").manifest
    assert NOT_COMPARED in manifest.description
    assert manifest.training.notes.startswith(NOT_COMPARED)


@pytest.mark.parametrize(
    "tap", ["resid_post.0", "resid_post.2", "final_norm", "resid_post.3", "attn_out.1", "mlp_out.1", "resid_pre.1", "resid_pre.3"]
)
def test_a_mismatch_names_the_tap_that_agrees(refused, direction, reference, tap):
    case, w = direction
    where = "resid_post.2" if tap in ("final_norm", "resid_post.3") else "resid_post.1"
    other = {"resid_pre.1": "resid_post.0", "resid_pre.3": "resid_post.2"}.get(tap, tap)
    given = author_scores(reference, GOLDEN, w, tap)
    message = refused(case, ProbeRefused, taps=[where] if tap != "resid_pre.3" else ["resid_post.1"], author_scores=given)
    assert "author_scores: found scores off by" in message
    assert f"--tap {other}" in message


def test_a_mismatch_of_several_taps_names_them_all(refused, tmp_path, reference):
    case = CASES["vllm-lens"](tmp_path, np.random.default_rng(3))
    state = {name: array.double().numpy() for name, array in torch.load(case.file, weights_only=True).items()}

    def scored(prompt, completion):
        x = [reference.activations([*prompt, *completion], [f"resid_post.{layer}"])[Tap("resid_post", layer)] for layer in (1, 2)]
        rows = np.concatenate(x, axis=1)[len(prompt) :].astype(np.float64)
        return (rows - state["mean"]) / np.maximum(state["std"], 1e-8) @ state["weight"] + state["bias"]

    given = [AuthorScores(prompt, completion, scored(prompt, completion)) for prompt, completion in GOLDEN]
    for wrong in (["resid_post.2", "resid_post.3"], ["resid_post.1", "resid_post.3"], ["resid_post.2", "resid_post.1"]):
        assert "--tap resid_post.1 --tap resid_post.2" in refused(case, ProbeRefused, taps=wrong, author_scores=given)


@pytest.mark.parametrize("kind", ["EleutherAI's attention probe", "SAELens 6, JumpReLU, layer norm", "onnx"])
def test_a_mismatch_of_a_probe_that_is_not_linear_names_the_tap_that_agrees(refused, tmp_path, reference, kind):
    made = CASES.get(kind, onnx_graph)(tmp_path, np.random.default_rng(3))
    pools = kind.startswith("Eleuther")

    def read_of(prompt, completion):
        every = reference.activations([*prompt, *completion], [f"resid_post.{layer}" for layer in range(N)])
        blocks = [every[Tap("resid_post", layer)].astype(np.float64) for layer in range(N)]
        # the author counts from the entry before, or after
        moved = [blocks[max(layer - 1, 0)] for layer in range(N)] if pools else [blocks[min(layer + 1, N - 1)] for layer in range(N)]
        return Read(moved, moved, moved, moved, len(prompt))

    rollouts = [*GOLDEN, ([BOS, 9, 8], [7, 6, 5, 30, 31, 32])]
    scores = [np.asarray(made.scores(read_of(*rollout))) for rollout in rollouts]
    given = [
        AuthorScores(prompt, completion, score=each) if pools else AuthorScores(prompt, completion, each)
        for (prompt, completion), each in zip(rollouts, scores, strict=True)
    ]
    message = refused(made, ProbeRefused, author_scores=given)
    assert f"--tap resid_post.{1 if pools else 2}" in message


def test_the_last_state_taken_for_the_last_block_is_caught(refused, direction, reference):
    case, w = direction
    given = author_scores(reference, GOLDEN, w, "final_norm")
    assert "--tap final_norm" in refused(case, ProbeRefused, taps=[f"resid_post.{N - 1}"], author_scores=given)


def test_scores_of_rollouts_tell_the_reduction(refused, imported, direction, reference):
    case, w = direction
    given = author_scores(reference, GOLDEN, w, "resid_post.1", per_token=False, reduce=lambda tokens: tokens[-1])
    assert "give reduction last" in refused(case, ProbeRefused, author_scores=given)
    assert imported(case, author_scores=given, reduction="last").agrees


def test_bos_centring_scale_and_sign_are_told_apart(refused, direction, reference):
    case, w = direction
    without = [(prompt[1:], completion) for prompt, completion in GOLDEN]
    scored = author_scores(reference, GOLDEN, w, "resid_post.1")
    moved = [AuthorScores(prompt, completion, one.token_scores) for (prompt, completion), one in zip(without, scored, strict=True)]
    assert "begin with BOS" in refused(case, ProbeRefused, author_scores=moved)
    centred = author_scores(reference, GOLDEN, w, "resid_post.1", change=lambda x: x - x.mean(-1, keepdims=True))
    assert "centred" in refused(case, ProbeRefused, author_scores=centred)
    scaled = author_scores(reference, GOLDEN, w / np.linalg.norm(w), "resid_post.1")
    assert "scale or offset alone" in refused(case, ProbeRefused, author_scores=scaled)
    assert "sign" in refused(case, ProbeRefused, author_scores=author_scores(reference, GOLDEN, -w, "resid_post.1"))


def test_scores_of_another_probe_agree_nowhere(refused, direction, reference):
    case, _ = direction
    given = author_scores(reference, GOLDEN, normal(np.random.default_rng(99), D), "resid_post.1")
    assert "the nearest of" in refused(case, ProbeRefused, author_scores=given)


def test_half_precision_agrees_and_says_so(imported, direction, reference):
    case, w = direction
    exact = author_scores(reference, GOLDEN, w, "resid_post.1")
    noise = 0.02 * np.std(np.concatenate([one.token_scores for one in exact])) * np.random.default_rng(0).standard_normal((3, 12))
    given = [AuthorScores(one.prompt_ids, one.completion_ids, one.token_scores + off) for one, off in zip(exact, noise, strict=True)]
    assert "as half precision gives" in imported(case, author_scores=given).notes[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([AuthorScores([5], [6, 7], token_scores=[1.0])], "shape (1,) for 2 tokens"),
        ([AuthorScores([5], [6, 7], score=1.0)], "1 scores"),
        ([AuthorScores([5], [6, 7], score=1.0)] * 3, "do not vary"),
        ([AuthorScores([5], [6, 7])], "one of the two"),
        ([AuthorScores([5], [VOCAB_SIZE], score=1.0)], "completion_ids"),
        ([AuthorScores([5], [6, 7, 8], token_scores=[1.0, float("nan"), 2.0])], "not finite"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(refused, direction, given, said):
    assert said in refused(direction[0], author_scores=given)


def test_a_probe_that_reads_an_entry_off_by_one_is_served_happily_without_them(imported, direction, reference):
    """Why they are asked for: nothing in a file tells that its tap is wrong."""
    case, _ = direction
    assert not imported(case, taps=["resid_post.2"]).agrees


# -------------------------------------------------------------------------------------------------------------------------------- docs


def test_the_page_has_every_format_and_no_other():
    page = DOCS.read_text().split("A tap is written")[0]
    rows = [line.split("|")[1].strip().strip("`") for line in page.splitlines() if line.startswith("| `")]
    assert rows == [known.name for known in FORMATS]
