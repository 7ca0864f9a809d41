"""A reference whose float32 is itself far from float64: its probes are written with the tolerance that they need, and served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from parity_models import ARCHITECTURES, BOS, HIDDEN, VOCAB_SIZE, write_model
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from torch.utils._python_dispatch import TorchDispatchMode

from probescore.types import Tap
from probescore_probes import ReferenceModel, Tolerance, linear_probe, read_probe_file, write_probe, write_probe_file
from probescore_probes.float64 import float64_activations
from probescore_server import Engine
from probescore_server.errors import ProbeRefused
from probescore_server.probes.format.manifest import TapInput

RANDOM = np.random.default_rng(0)
DIRECTION = RANDOM.standard_normal(HIDDEN)
GOLDEN = [([BOS, *RANDOM.integers(4, VOCAB_SIZE, 9)], RANDOM.integers(4, VOCAB_SIZE, 120)) for _ in range(3)]


@pytest.fixture(scope="module")
def inexact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gated delta net that forgets quickly and reads strongly: what it reads is mostly nothing, and is divided by its own size."""
    model = write_model(tmp_path_factory.mktemp("inexact"), "qwen3_next")
    weights = load_file(model / "model.safetensors")
    random = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if "linear_attn.in_proj" in name:
            weights[name] = weight * 16
        elif name.endswith("A_log"):
            weights[name] = torch.log(16 * torch.rand(weight.shape, generator=random))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.fixture(scope="module")
def reference(inexact: Path) -> ReferenceModel:
    return ReferenceModel.load(inexact)


def write(path: Path, reference: ReferenceModel, **said: Any) -> Path:
    write_probe(
        path, linear_probe(DIRECTION), reference, **({"name": "probe", "version": "1", "taps": ["resid_post.2"], "golden": GOLDEN} | said)
    )
    return path


def test_a_right_probe_is_served_though_its_reference_is_inexact(inexact: Path, reference: ReferenceModel, tmp_path: Path) -> None:
    file = write(tmp_path / "probe.onnx", reference)
    tolerance = read_probe_file(file).manifest.golden.tolerance
    assert 1e-4 < tolerance.float32 <= 1e-2
    assert (tolerance.bfloat16, tolerance.float16) == (Tolerance().bfloat16, Tolerance().float16)
    Engine.load(str(inexact), [file])
    with pytest.raises(ProbeRefused, match="differ by up to"):
        Engine.load(str(inexact), [write(tmp_path / "usual.onnx", reference, tolerance=Tolerance())])


@pytest.mark.parametrize("layer", [1, 3])
def test_the_block_beside_is_still_refused(inexact: Path, reference: ReferenceModel, tmp_path: Path, layer: int) -> None:
    probe = read_probe_file(write(tmp_path / "probe.onnx", reference))
    graph = onnx.load_from_string(probe.graph)
    graph.graph.input[0].name = f"resid_post.{layer}"
    for node in graph.graph.node:
        node.input[:] = [f"resid_post.{layer}" if name == "resid_post.2" else name for name in node.input]
    inputs = (TapInput(hook="resid_post", layer=layer),)
    write_probe_file(tmp_path / "probe.onnx", graph, probe.manifest.model_copy(update={"inputs": inputs}))
    with pytest.raises(ProbeRefused) as refused:
        Engine.load(str(inexact), [tmp_path / "probe.onnx"])
    assert refused.value.field == "golden"


def test_an_exact_reference_keeps_the_usual_tolerance(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "qwen3_next")
    file = write(tmp_path / "probe.onnx", ReferenceModel.load(model))
    assert read_probe_file(file).manifest.golden.tolerance == Tolerance()


def test_what_the_author_says_is_not_measured(reference: ReferenceModel, tmp_path: Path) -> None:
    file = write(tmp_path / "probe.onnx", reference, tolerance=Tolerance(float32=0.003))
    assert read_probe_file(file).manifest.golden.tolerance.float32 == 0.003


def test_a_reference_too_inexact_to_check_by_is_refused(reference: ReferenceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given less patience with it than there is, since nothing small is as inexact as that."""
    monkeypatch.setattr("probescore_probes.writing.MAX_MEASURED_TOLERANCE", 2e-4)
    with pytest.raises(ProbeRefused, match=r"standard deviation from float64, expected at most 5e-05 ×: load it in float32") as refused:
        write(tmp_path / "probe.onnx", reference)
    assert refused.value.field == "golden"
    assert not (tmp_path / "probe.onnx").exists()
    write(tmp_path / "probe.onnx", reference, tolerance=Tolerance(float32=0.1))


def test_a_model_without_float64_keeps_the_usual_tolerance_and_says_so(
    reference: ReferenceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def double(self: torch.Tensor) -> torch.Tensor:
        raise TypeError("this device has no float64")

    monkeypatch.setattr(torch.Tensor, "double", double)
    with capture_logs() as logs:
        file = write(tmp_path / "probe.onnx", reference)
    monkeypatch.undo()
    assert read_probe_file(file).manifest.golden.tolerance == Tolerance()
    assert [log["problem"] for log in logs if "float64" in log["event"]] == ["this device has no float64"]


class _Narrow(TorchDispatchMode):
    """Collects operations that give float32."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype is torch.float32 and result.is_floating_point():
            self.found.add(str(func))
        return result


TAPS = [Tap("resid_pre", 0), Tap("resid_post", 1), Tap("attn_out", 2), Tap("mlp_out", 2), Tap("resid_post", 3), Tap("final_norm")]


@pytest.mark.parametrize("architecture", ["llama", "qwen3_next", "gpt2", "gemma3_text", "gpt_oss", "bloom", "deepseek_v3"])
def test_nothing_is_computed_in_less_than_float64_and_the_model_is_left_as_it_was(tmp_path: Path, architecture: str) -> None:
    assert architecture in ARCHITECTURES
    model = ReferenceModel.load(write_model(tmp_path / "model", architecture))
    ids = RANDOM.integers(4, VOCAB_SIZE, 40)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    plain = model.activations(ids, TAPS)

    with _Narrow() as narrow:
        exact = float64_activations(model, ids, TAPS)

    assert narrow.found <= {"aten.detach.default", "aten.view.default", "aten.alias.default"}, narrow.found
    for tap in TAPS:
        assert exact[tap].dtype == np.float64
        assert not np.array_equal(exact[tap].astype(np.float32).astype(np.float64), exact[tap]) or tap == Tap("resid_pre", 0)
        np.testing.assert_allclose(exact[tap], plain[tap], atol=1e-3 * plain[tap].std())
        np.testing.assert_array_equal(model.activations(ids, TAPS)[tap], plain[tap])
    for name, tensor in model.model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_a_forward_that_fails_leaves_the_model_as_it_was(reference: ReferenceModel) -> None:
    before = {name: tensor.clone() for name, tensor in reference.model.state_dict().items()}
    with pytest.raises(ValueError, match="id 1000000"):
        float64_activations(reference, [10**6], TAPS)
    handle = reference.model.get_decoder().layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        float64_activations(reference, [5, 6], TAPS)
    handle.remove()
    for name, tensor in reference.model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert reference.model.config._experts_implementation != "eager"
