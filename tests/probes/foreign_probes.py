"""Probes as other libraries save them, each with its formula in plain numpy, written from the library and not from its import.

A case is a file or folder in the exact layout, what an import must be told beside it, and ``scores(read)``: of the tokens of a completion
``(T, labels)``, or of the rollout ``(labels,)``. ``read`` is what plain Hugging Face gives.
"""

from __future__ import annotations

import enum
import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from models import HIDDEN_SIZE, LAYERS
from onnx import TensorProto, helper, numpy_helper, save
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

D, N = HIDDEN_SIZE, LAYERS
Array = np.ndarray


@dataclass(frozen=True)
class Read:
    """What Hugging Face gives for a rollout.

    Attributes:
        states: ``hidden_states``, ``N + 1`` of ``(tokens, D)``, prompt included; the last after the final norm.
        blocks: what leaves each block.
        attention: what the attention of each block gives.
        mlp: what the MLP of each block gives.
        prompt: how many tokens of the prompt there are.
    """

    states: list[Array]
    blocks: list[Array]
    attention: list[Array]
    mlp: list[Array]
    prompt: int

    def state(self, index: int) -> Array:
        return self.states[index][self.prompt :]

    def block(self, index: int) -> Array:
        return self.blocks[index][self.prompt :]


@dataclass(frozen=True)
class Case:
    file: Path
    scores: Callable[[Read], Array]
    told: dict[str, Any] = field(default_factory=dict)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def tensor(array: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(np.asarray(array), dtype=dtype)


def normal(random: np.random.Generator, *shape: int) -> Array:
    """Numbers that float32 holds exactly, so that a file loses nothing of them."""
    return random.standard_normal(shape).astype(np.float32).astype(np.float64)


def saved(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def written(path: Path, config: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    return path


# -------------------------------------------------------------------------------------------------------------- directions and weights


def plain_direction(folder: Path, r: np.random.Generator) -> Case:
    w = normal(r, D)
    np.save(folder / "direction.npy", w.astype(np.float32))
    return Case(folder / "direction.npy", lambda read: read.block(1) @ w, {"taps": ["resid_post.1"]})


def named_direction(folder: Path, r: np.random.Generator) -> Case:
    w, b = normal(r, 2, D), normal(r, 2)
    save_file({"weight": tensor(w), "bias": tensor(b)}, folder / "d.safetensors")
    told = {"taps": ["model.layers[2].output[0]"], "labels": ["calm", "angry"]}
    return Case(folder / "d.safetensors", lambda read: read.block(2) @ w.T + b, told)


def column_in_npz(folder: Path, r: np.random.Generator) -> Case:
    w = normal(r, D, 1)
    np.savez(folder / "d.npz", direction=w.astype(np.float32))
    return Case(folder / "d.npz", lambda read: read.state(2) @ w, {"taps": ["hidden_states[2]"]})


def half_precision_module(folder: Path, r: np.random.Generator) -> Case:
    layer = torch.nn.Linear(D, 1).bfloat16()
    w, b = (p.detach().float().numpy().astype(np.float64) for p in (layer.weight, layer.bias))
    file = saved(folder / "d.pt", {"linear.weight": layer.weight.detach(), "linear.bias": layer.bias.detach()})
    return Case(file, lambda read: read.attention[1][read.prompt :] @ w.T + b, {"taps": ["blocks.1.hook_attn_out"]})


def hidden_states_direction(index: int) -> Callable[[Path, np.random.Generator], Case]:
    def make(folder: Path, r: np.random.Generator) -> Case:
        every = normal(r, N + 1, D)
        file = saved(folder / "all.pt", tensor(every))
        told = {"format": "hf-directions", "taps": [f"hidden_states[{index}]"]}
        return Case(file, lambda read: read.state(index) @ every[index], told)

    return make


def standardised(folder: Path, r: np.random.Generator) -> Case:
    rows = normal(r, 7, D)
    w, b, mean, std = normal(r, 1, D), normal(r, 1), rows.mean(0), rows.std(0, ddof=1) + 1e-3
    file = saved(folder / "probe.pt", {"weight": tensor(w), "bias": tensor(b), "mean": tensor(mean), "std": tensor(std)})
    m32, s32 = mean.astype(np.float32), std.astype(np.float32)
    return Case(file, lambda read: (read.block(3) - m32) / s32 @ w.T + b, {"taps": ["resid_post.3"]})


def vllm_lens(folder: Path, r: np.random.Generator) -> Case:
    """``torch.save({"weight": w, "bias": b, "mean": mean, "std": std})`` over flattened layers, as its deception example does."""
    w, b, mean, std = normal(r, 2 * D), normal(r, 1), normal(r, 2 * D), 0.5 + np.abs(normal(r, 2 * D))
    std = std.astype(np.float32).astype(np.float64)
    std[3] = 0.0  # clamped when it is applied
    w[3] = 0.0
    file = saved(folder / "deception_probe.pt", {"weight": tensor(w), "bias": tensor(b), "mean": tensor(mean), "std": tensor(std)})

    def scores(read: Read) -> Array:
        x = np.concatenate([read.block(1), read.block(2)], axis=1)
        return ((x - mean) / np.maximum(std, 1e-8) @ w + b).mean(0)

    return Case(file, scores, {"format": "vllm-lens", "taps": ["resid_post.1", "resid_post.2"]})


# ------------------------------------------------------------------------------------------------------------------- named libraries


def hallucination_probe(folder: Path, r: np.random.Generator, layer: int = 2) -> Case:
    w, b = normal(r, 1, D), normal(r, 1)
    saved(folder / "probe_head.bin", {"weight": tensor(w), "bias": tensor(b)})
    written(folder / "probe_config.json", {"target_layer_name": "LlamaDecoderLayer", "layer_idx": layer, "hidden_size": D})
    return Case(folder, lambda read: sigmoid(read.block(layer) @ w.T + b))


def with_private_enum(file: Path, content: dict[str, Any], value: str) -> Path:
    """As AISI's checkpoints are pickled: with an enum of a package that nobody has."""
    module = types.ModuleType("deception.detectors.utils.types")

    class ProbeArchitecture(str, enum.Enum):
        DIFFERENCE_IN_MEANS = "dim"
        LOGISTIC_REGRESSION = "lr"
        MULTI_LAYER_PERCEPTRON = "mlp"

    ProbeArchitecture.__module__, ProbeArchitecture.__qualname__ = module.__name__, "ProbeArchitecture"
    module.ProbeArchitecture = ProbeArchitecture
    names = ["deception", "deception.detectors", "deception.detectors.utils", module.__name__]
    try:
        sys.modules.update({name: types.ModuleType(name) for name in names[:-1]} | {module.__name__: module})
        content["hyperparams"]["probe_architecture"] = ProbeArchitecture(value)
        return saved(file, content)
    finally:
        for name in names:
            sys.modules.pop(name, None)


def lie_detector(kind: str) -> Callable[[Path, np.random.Generator], Case]:
    def make(folder: Path, r: np.random.Generator) -> Case:
        mean, std = normal(r, D), 0.2 + np.abs(normal(r, D)).astype(np.float32).astype(np.float64)
        std = std.astype(np.float32).astype(np.float64)
        scaled = {"dataset_mean": tensor(mean), "dataset_std": tensor(std), "threshold": torch.tensor(1.25)}
        if kind == "dim":
            w = normal(r, D)
            state, formula = {"direction": tensor(w), "threshold": torch.tensor(1.25)}, lambda x: x @ w
        elif kind == "lr":
            w, b = normal(r, 1, D), normal(r, 1)
            state, formula = {"linear.weight": tensor(w), "linear.bias": tensor(b)} | scaled, lambda x: (x - mean) / std @ w.T + b
        else:
            w, b, v, c = normal(r, 16, D), normal(r, 16), normal(r, 1, 16), normal(r, 1)
            state = {"net.0.weight": tensor(w), "net.0.bias": tensor(b), "net.2.weight": tensor(v), "net.2.bias": tensor(c)} | scaled
            formula = lambda x: np.maximum((x - mean) / std @ w.T + b, 0) @ v.T + c  # noqa: E731
        content = {"state_dict": state, "hyperparams": {"layer": 2, "layer_pct": 50, "weight_decay": 0.001}}
        file = with_private_enum(folder / "probe.pt", content, kind)
        return Case(file, lambda read: formula(read.state(2)), {"taps": ["hidden_states[2]"]})

    return make


def sae(
    version: int, architecture: str, normalise: str = "none", hook: str = "hook_resid_post", subtract: bool = True, rescale: bool = False
):
    def make(folder: Path, r: np.random.Generator) -> Case:
        width, features, k = 24, [3, 11], 6
        enc, b_enc, dec, b_dec = normal(r, D, width), normal(r, width), normal(r, width, D), normal(r, D)
        threshold = 0.3 + np.abs(normal(r, width)).astype(np.float32).astype(np.float64)
        threshold = threshold.astype(np.float32).astype(np.float64)
        weights = {"W_enc": enc, "b_enc": b_enc, "W_dec": dec, "b_dec": b_dec}
        if architecture == "jumprelu":
            weights["threshold"] = threshold
        save_file({name: tensor(array) for name, array in weights.items()}, folder / "sae_weights.safetensors")
        hooked = {"hook_name": f"blocks.1.{hook}", "model_name": "tiny", "prepend_bos": True}
        common = {"d_in": D, "d_sae": width, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": subtract}
        common["normalize_activations"] = normalise
        if version == 6:
            config = common | {
                "architecture": architecture,
                "reshape_activations": "none",
                "metadata": hooked | {"sae_lens_version": "6.1.0"},
            }
            config |= {"k": k, "rescale_acts_by_decoder_norm": rescale} if architecture == "topk" else {}
        else:
            of_topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": k}, "architecture": "standard"}
            kind = (
                of_topk
                if architecture == "topk"
                else {"activation_fn_str": "relu", "activation_fn_kwargs": {}, "architecture": architecture}
            )
            config = (
                common | kind | hooked | {"hook_layer": 1, "hook_head_index": None, "finetuning_scaling_factor": False, "context_size": 128}
            )
        written(folder / "cfg.json", config)

        def scores(read: Read) -> Array:
            x = {
                "hook_resid_post": read.block(1),
                "hook_resid_pre": read.state(1),
                "hook_attn_out": read.attention[1][read.prompt :],
                "hook_mlp_out": read.mlp[1][read.prompt :],
            }[hook]
            if normalise == "layer_norm":
                x = x - x.mean(-1, keepdims=True)
                x = x / (x.std(-1, ddof=1, keepdims=True) + 1e-5)
            elif normalise == "constant_norm_rescale":
                x = x * np.sqrt(D) / np.linalg.norm(x, axis=-1, keepdims=True)
            before = (x - b_dec * subtract) @ enc + b_enc
            if rescale:
                before = before * np.linalg.norm(dec, axis=-1)
            if architecture == "jumprelu":
                return (np.maximum(before, 0) * (before > threshold))[:, features]
            if architecture == "topk":
                kept = before >= np.sort(before, axis=-1)[:, [-k]]
                return (np.maximum(before, 0) * kept)[:, features]
            return np.maximum(before, 0)[:, features]

        return Case(folder, scores, {"features": features})

    return make


def pickled_pipeline(folder: Path, r: np.random.Generator) -> Case:
    x = normal(r, 60, D) * 2 + 1
    estimator = make_pipeline(StandardScaler(), LogisticRegression()).fit(x, x[:, 0] + normal(r, 60) > 1)
    joblib.dump(estimator, folder / "probe.joblib")
    told = {"taps": ["hidden_states[3]"], "trust_pickle": True}
    (scaler, model) = (step for _, step in estimator.steps)
    formula = lambda x: (x - scaler.mean_) / scaler.scale_ @ model.coef_.T + model.intercept_  # noqa: E731
    return Case(folder / "probe.joblib", lambda read: formula(read.state(3)), told)


def onnx_graph(folder: Path, r: np.random.Generator) -> Case:
    """An exporter's usual graph: its own names, doubles inside, a vector of scores."""
    w, b, v = normal(r, D, 5), normal(r, 5), normal(r, 5)
    nodes = [
        helper.make_node("Cast", ["input"], ["wide"], to=TensorProto.DOUBLE),
        helper.make_node("MatMul", ["wide", "w"], ["a"]),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Tanh", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "v"], ["e"]),
        helper.make_node("Sigmoid", ["e"], ["output"]),
    ]
    ends = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", D]),
        helper.make_tensor_value_info("output", TensorProto.DOUBLE, ["batch"]),
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in (("w", w), ("b", b), ("v", v))]
    graph = helper.make_graph(nodes, "torch_jit", ends[:1], ends[1:], weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "probe.onnx")
    return Case(folder / "probe.onnx", lambda read: sigmoid(np.tanh(read.block(1) @ w + b) @ v), {"taps": ["resid_post.1"]})


def onnx_graph_of_two_taps(folder: Path, r: np.random.Generator) -> Case:
    """A graph with an input for each tap, one of them of doubles."""
    w, v = normal(r, D, 2), normal(r, D, 2)
    nodes = [
        helper.make_node("MatMul", ["early", "w"], ["a"]),
        helper.make_node("Cast", ["late"], ["narrow"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["narrow", "v"], ["b"]),
        helper.make_node("Mul", ["a", "b"], ["output"]),
    ]
    ends = [
        helper.make_tensor_value_info("early", TensorProto.FLOAT, ["batch", D]),
        helper.make_tensor_value_info("late", TensorProto.DOUBLE, ["batch", D]),
        helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 2]),
    ]
    weights = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in (("w", w), ("v", v))]
    graph = helper.make_graph(nodes, "g", ends[:2], ends[2:], weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "probe.onnx")
    return Case(folder / "probe.onnx", lambda read: (read.block(0) @ w) * (read.block(2) @ v), {"taps": ["resid_post.0", "resid_post.2"]})


def attention_probe(mlp: bool) -> Callable[[Path, np.random.Generator], Case]:
    def make(folder: Path, r: np.random.Generator) -> Case:
        heads, out = 3, 4 if mlp else 2
        q, v, c, p = 0.3 * normal(r, heads, D), normal(r, heads * out, D), normal(r, heads * out), 0.1 * normal(r, heads)
        q, p = (array.astype(np.float32).astype(np.float64) for array in (q, p))
        o, d = normal(r, 2, out), normal(r, 2)
        state = {"position_weight": tensor(p), "q.weight": tensor(q), "v.weight": tensor(v), "v.bias": tensor(c)}
        state |= {"o.weight": tensor(o), "o.bias": tensor(d)} if mlp else {}
        file = saved(folder / "probe.pt", state)

        def scores(read: Read) -> Array:
            x = read.block(2)
            logits = x @ q.T + np.arange(read.prompt, read.prompt + len(x))[:, None] * p
            a = np.exp(logits - logits.max(0))
            a = a / a.sum(0)
            values = (x @ v.T + c).reshape(len(x), heads, out)
            pooled = (a[:, :, None] * values).sum((0, 1))
            return np.maximum(pooled, 0) @ o.T + d if mlp else pooled

        return Case(file, scores, {"taps": ["resid_post.2"]})

    return make


def mass_mean(folder: Path, r: np.random.Generator) -> Case:
    directions, layers = normal(r, 3, D), [1, 2, 4]
    file = saved(folder / "strict_probe.mmpprobe", {"direction": tensor(directions), "layers": layers})
    written(
        folder / "probe_rh_summary_stats.json", {"strict_probe.mmpprobe": {"4": {"strict_threshold": 0.3, "strict_roc_auc_score": 0.9}}}
    )
    return Case(file, lambda read: read.state(4).mean(0) @ directions[2], {"taps": ["hidden_states[4]"]})


def logistic_by_layer(folder: Path, r: np.random.Generator) -> Case:
    x = normal(r, 60, D)
    fitted = {layer: LogisticRegression().fit(x, x[:, layer] > 0) for layer in (1, 3)}
    joblib.dump({0: None} | fitted, folder / "strict_probe.lgprobe")
    model = fitted[3]
    formula = lambda x: x @ model.coef_[0] + model.intercept_  # noqa: E731
    told = {"taps": ["hidden_states[3]"], "trust_pickle": True}
    return Case(folder / "strict_probe.lgprobe", lambda read: formula(read.state(3).mean(0)), told)


def atlas(
    kind: str, aggregator: str = "mean", normalise: str = "none", layer: int = 1, wrapped: bool = False, variant: str = ""
) -> Callable[[Path, np.random.Generator], Case]:
    def make(folder: Path, r: np.random.Generator) -> Case:
        a, b, scale = 0.7, -0.2, 3.0
        state, init, score, heads = ATLAS[kind + variant](r)
        state |= {"input_scale": torch.tensor(scale), "platt_A": torch.tensor(a), "platt_B": torch.tensor(b)}
        if wrapped:  # in an AggregatedProbe, which has a line of Platt's of its own and uses that alone
            state |= {"platt_A": torch.tensor(9.0), "platt_B": torch.tensor(9.0)}
            state = {f"probe.{name}": value for name, value in state.items()} | {"platt_A": torch.tensor(a), "platt_B": torch.tensor(b)}
        saved(folder / f"layer_{layer}" / "model.pt", state)
        config = {
            "class_name": kind,
            "module": "obfuscation_atlas.detectors.probe_archs",
            "init_args": init | {"normalize_input": normalise},
        }
        written(folder / f"layer_{layer}" / "config.json", config)
        a32, b32 = float(np.float32(a)), float(np.float32(b))

        def scores(read: Read) -> Array:
            x = read.state(layer + 1)
            if normalise == "l2":
                x = x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)
            elif normalise == "unit_norm":
                x = x / scale
            q, v = score(x)
            return a32 * aggregated(q, v, aggregator) + b32

        told = {"reduction": aggregator} | ({"heads": heads} if heads else {})
        return Case(folder / f"layer_{layer}", scores, told)

    return make


def aggregated(q: Array, v: Array, aggregator: str) -> Array:
    """``SequenceAggregator`` of one sequence, by loops."""
    together = v.sum(-1)
    match aggregator.partition("(")[0]:
        case "mean":
            return together.mean()
        case "max":
            return together.max()
        case "last":
            return together[-1]
        case "multimax":
            return v.max(0).sum()
    a = np.exp(q - q.max(0))
    a = a / a.sum(0)
    w = int(aggregator.partition("(")[2].strip(")") or 10)
    if aggregator == "attention" or len(v) < w:
        return (a * v).sum()
    windows = []
    for start in range(len(v) - w + 1):
        share = a[start : start + w]
        windows.append((share / (share.sum(0) + 1e-8) * v[start : start + w]).sum(0))
    return np.max(windows, axis=0).sum()


def _layers(r: np.random.Generator, **sizes: tuple[int, int]) -> dict[str, torch.Tensor]:
    state = {}
    for name, (out, inner) in sizes.items():
        key = name.replace("_dot_", ".")
        state |= {f"{key}.weight": tensor(normal(r, out, inner) / np.sqrt(inner)), f"{key}.bias": tensor(normal(r, out))}
    return state


def _numbers(state: dict[str, torch.Tensor]) -> dict[str, Array]:
    return {name: array.double().numpy() for name, array in state.items()}


def _atlas_linear(r: np.random.Generator):
    state = _layers(r, linear=(3, D))
    n = _numbers(state)
    return state, {"d_model": D, "nhead": 3}, lambda x: (x @ n["linear.weight"].T + n["linear.bias"],) * 2, None


def _atlas_quadratic(r: np.random.Generator):
    state = _layers(r, linear=(1, D)) | {"M": tensor(normal(r, D, D) / D)}
    n = _numbers(state)

    def score(x: Array):
        v = np.array([[row @ n["M"] @ row] for row in x]) + x @ n["linear.weight"].T + n["linear.bias"]
        return v, v

    return state, {"d_model": D}, score, None


def _atlas_nonlinear(r: np.random.Generator):
    state = _layers(r, mlp_dot_0=(12, D), mlp_dot_3=(1, 12))
    n = _numbers(state)

    def score(x: Array):
        v = np.maximum(x @ n["mlp.0.weight"].T + n["mlp.0.bias"], 0) @ n["mlp.3.weight"].T + n["mlp.3.bias"]
        return v, v

    return state, {"d_model": D, "d_mlp": 12, "nhead": 1, "dropout": 0.1}, score, None


def _atlas_gdm(r: np.random.Generator):
    state = _layers(r, mlp_dot_0=(10, D), mlp_dot_2=(10, 10), q_proj=(4, 10), v_proj=(4, 10))
    n = _numbers(state)

    def score(x: Array):
        y = np.maximum(x @ n["mlp.0.weight"].T + n["mlp.0.bias"], 0) @ n["mlp.2.weight"].T + n["mlp.2.bias"]
        return y @ n["q_proj.weight"].T + n["q_proj.bias"], y @ n["v_proj.weight"].T + n["v_proj.bias"]

    return state, {"d_model": D, "d_proj": 10, "nhead": 10, "num_mlp_layers": 2}, score, None


def _atlas_attention(r: np.random.Generator, window: int | None = 4):
    heads, size = 2, 6
    state = _layers(r, qkv_proj=(3 * size * heads, D), out_proj=(1, size * heads))
    n = _numbers(state)
    if window is not None:
        state["base_mask"] = torch.ones(32, 32, dtype=torch.bool).tril().triu(1 - window)

    def score(x: Array):
        qkv = (x @ n["qkv_proj.weight"].T + n["qkv_proj.bias"]).reshape(len(x), 3, heads, size)
        rows = []
        for i in range(len(x)):
            seen = slice(0 if window is None else max(0, i - window + 1), i + 1)
            mixed = []
            for h in range(heads):
                logits = qkv[seen, 1, h] @ qkv[i, 0, h] / np.sqrt(size)
                weight = np.exp(logits - logits.max())
                mixed.append(weight / weight.sum() @ qkv[seen, 2, h])
            rows.append(np.concatenate(mixed) @ n["out_proj.weight"].T + n["out_proj.bias"])
        return np.array(rows), np.array(rows)

    # the number of heads in the file is another one than the true one, as it happens
    return state, {"d_model": D, "d_proj": size, "nhead": 8, "sliding_window": window, "max_length": 32}, score, heads


def _atlas_transformer(r: np.random.Generator, activation: str = "relu", norm_first: bool = True):
    torch.manual_seed(3)
    layer = torch.nn.TransformerEncoderLayer(D, 4, 20, dropout=0.0, activation=activation, norm_first=norm_first, batch_first=True)
    last = torch.nn.LayerNorm(D) if norm_first else None
    encoder = torch.nn.TransformerEncoder(layer, 2, norm=last, enable_nested_tensor=False).double().eval()
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.copy_(tensor(weight.float() + 0.3 * torch.randn(weight.shape)))
    out = torch.nn.Linear(D, 1)
    state = {f"transformer.{name}": value.float() for name, value in encoder.state_dict().items()}
    state |= {"out_proj.weight": out.weight.detach(), "out_proj.bias": out.bias.detach()}

    def score(x: Array):
        with torch.no_grad():
            rows = torch.tensor(x, dtype=torch.float64)[None]
            mask = torch.nn.Transformer.generate_square_subsequent_mask(len(x), dtype=torch.float64)
            v = out.double()(encoder(rows, mask=mask, is_causal=True))[0].numpy()
        return v, v

    return state, {"d_model": D, "nlayer": 2, "nhead": 4, "d_mlp": 20, "norm_first": norm_first, "activation": activation}, score, 4


ATLAS = {
    "LinearProbe": _atlas_linear,
    "QuadraticProbe": _atlas_quadratic,
    "NonlinearProbe": _atlas_nonlinear,
    "GDMProbe": _atlas_gdm,
    "AttentionProbe": _atlas_attention,
    "TransformerProbe": _atlas_transformer,
    "AttentionProbe without a window": lambda r: _atlas_attention(r, None),
    "TransformerProbe of its second kind": lambda r: _atlas_transformer(r, "gelu", norm_first=False),
}


def sing_probe(
    kind: str, activation: str = "gelu", window: int | None = None, together: bool = False
) -> Callable[[Path, np.random.Generator], Case]:
    def make(folder: Path, r: np.random.Generator) -> Case:
        layers, labels, heads, size = [1, 3], 2, 2, 5
        config = {"model_type": f"sing_probe_{kind}", "hidden_size": D, "base_model_layer_ids": layers, "num_labels": labels}
        width, inner = D * len(layers), heads * size
        if kind == "mlp":
            state = _layers(r, fc1=(8, width), fc2=(labels, 8))
            config |= {"intermediate_size": 8, "hidden_act": activation, "labels": ["risk", "unsafe"]}
        else:
            state = _layers(r, classifier=(labels, inner)) | {"norm.weight": tensor(1 + 0.2 * normal(r, inner))}
            for name, shape in (
                ("proj_q", (inner, width)),
                ("proj_k", (size, width)),
                ("proj_v", (size, width)),
                ("o_proj", (inner, inner)),
            ):
                state[f"{name}.weight"] = tensor(normal(r, *shape) / np.sqrt(shape[1]))
            config |= {"num_attention_heads": heads, "head_dim": size, "sliding_window": window}
        n = _numbers(state)
        if together:  # as vLLM keeps the three projections
            state["proj_qkv.weight"] = torch.cat([state.pop(f"proj_{each}.weight") for each in "qkv"])
        save_file(state, folder / "model.safetensors")
        written(folder / "config.json", config)

        def scores(read: Read) -> Array:
            entering = [read.states[layer] for layer in layers]
            x = np.concatenate([e / np.sqrt((e**2).mean(-1, keepdims=True) + 1e-6) for e in entering], axis=1)
            if kind == "mlp":
                hidden = torch.tensor(x @ n["fc1.weight"].T + n["fc1.bias"])
                active = (torch.nn.functional.gelu(hidden) if activation == "gelu" else hidden.relu()).numpy()
                return sigmoid(active @ n["fc2.weight"].T + n["fc2.bias"])[read.prompt :]
            q, k, v = (x @ n[f"proj_{each}.weight"].T for each in "qkv")
            rows = []
            for i in range(len(x)):
                seen = slice(0 if window is None else max(0, i - window + 1), i + 1)
                mixed = []
                for h in range(heads):
                    logits = k[seen] @ q[i, h * size : (h + 1) * size] / np.sqrt(size)
                    weight = np.exp(logits - logits.max())
                    mixed.append(weight / weight.sum() @ v[seen])
                hidden = n["o_proj.weight"] @ np.concatenate(mixed) + q[i]
                hidden = hidden / np.sqrt((hidden**2).mean() + 1e-6) * n["norm.weight"]
                rows.append(n["classifier.weight"] @ hidden + n["classifier.bias"])
            return sigmoid(np.array(rows))[read.prompt :]

        return Case(folder, scores)

    return make


CASES: dict[str, Callable[[Path, np.random.Generator], Case]] = {
    "direction in npy": plain_direction,
    "matrix in safetensors, nnsight's name": named_direction,
    "column in npz, entry of hidden_states": column_in_npz,
    "module in bfloat16, TransformerLens' name": half_precision_module,
    "directions for hidden_states: the embeddings": hidden_states_direction(0),
    "directions for hidden_states: between": hidden_states_direction(2),
    "directions for hidden_states: the last": hidden_states_direction(N),
    "weight, bias, mean, std": standardised,
    "vllm-lens": vllm_lens,
    "hallucination probe": hallucination_probe,
    "lie detector: difference of means": lie_detector("dim"),
    "lie detector: logistic regression": lie_detector("lr"),
    "lie detector: perceptron": lie_detector("mlp"),
    "SAELens 6, standard": sae(6, "standard"),
    "SAELens 5, standard, before the block": sae(5, "standard", hook="hook_resid_pre"),
    "SAELens 6, attention's output, b_dec not subtracted": sae(6, "standard", hook="hook_attn_out", subtract=False),
    "SAELens 5, the MLP's output": sae(5, "standard", hook="hook_mlp_out"),
    "SAELens 6, JumpReLU, layer norm": sae(6, "jumprelu", "layer_norm"),
    "SAELens 5, JumpReLU, constant norm": sae(5, "jumprelu", "constant_norm_rescale"),
    "SAELens 6, topk, rescaled": sae(6, "topk", rescale=True),
    "SAELens 5, topk": sae(5, "topk"),
    "scikit-learn by joblib": pickled_pipeline,
    "ONNX": onnx_graph,
    "ONNX, an input for each of two taps": onnx_graph_of_two_taps,
    "EleutherAI's attention probe": attention_probe(False),
    "EleutherAI's attention probe with an MLP": attention_probe(True),
    "rl-rewardhacking, mass mean": mass_mean,
    "rl-rewardhacking, logistic regression": logistic_by_layer,
    "Atlas, linear, three heads": atlas("LinearProbe", "max", "l2"),
    "Atlas, quadratic": atlas("QuadraticProbe", "last", "unit_norm"),
    "Atlas, nonlinear, last layer": atlas("NonlinearProbe", "mean", layer=N - 1),
    "Atlas, attention": atlas("AttentionProbe", "last"),
    "Atlas, attention without a window": atlas("AttentionProbe", "mean", variant=" without a window"),
    "Atlas, transformer": atlas("TransformerProbe", "mean"),
    "Atlas, transformer, gelu, norms last": atlas("TransformerProbe", "last", variant=" of its second kind"),
    "Atlas, linear, in its aggregator": atlas("LinearProbe", "last", "unit_norm", wrapped=True),
    "Atlas, Gemini's, multimax": atlas("GDMProbe", "multimax"),
    "Atlas, Gemini's, attention": atlas("GDMProbe", "attention"),
    "Atlas, Gemini's, rolling attention": atlas("GDMProbe", "rolling_attention(4)"),
    "Atlas, Gemini's, rolling attention wider than a rollout": atlas("GDMProbe", "rolling_attention(10)"),
    "SingProbe, MLP": sing_probe("mlp"),
    "SingProbe, MLP, relu": sing_probe("mlp", "relu"),
    "SingProbe, attention": sing_probe("attn"),
    "SingProbe, attention in a window": sing_probe("attn", window=4),
    "SingProbe, attention, its projections together": sing_probe("attn", together=True),
}
