"""The packed path is chosen where it agrees with the universal one on the model's own weights, and never where it does not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import structlog
import torch
import varlen_reference
from packed_models import open_decoder, packable_decoder

from probescore.types import Tap
from probescore_server.backbone.model_loading import Decoder
from probescore_server.backbone.packed.attention import Kernel
from probescore_server.backbone.selection import _kernel_refusal, choose_backbone
from probescore_server.backbone.taps import TapReader


def chosen(decoder: Decoder, kernel: Kernel | None) -> tuple[str, str, list[str]]:
    """The path's name, why, and the warnings that were logged."""
    with structlog.testing.capture_logs() as logs:
        backbone, reason = choose_backbone(decoder, TapReader(decoder, [Tap("resid_post", 3)]), kernel)
    return backbone.name, reason, [log["reason"] for log in logs if log["log_level"] == "warning"]


def shifted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any, window_size: tuple[int, int], **options: Any) -> Any:
    """A kernel whose windows are one token short."""
    left, right = window_size
    return varlen_reference.varlen_attn(query, key, value, *others, window_size=(max(left - 1, -1), right), **options)


def top_left(*inputs: Any, window_size: tuple[int, int], **options: Any) -> Any:
    """A kernel that aligns queries and keys at their beginnings."""
    query, key, value, cu_seq_q, cu_seq_k, _, _ = inputs
    shortened = torch.cat([torch.arange(*cu_seq_k[i : i + 2])[: int(cu_seq_q[i + 1] - cu_seq_q[i])] for i in range(len(cu_seq_q) - 1)])
    longest = int(cu_seq_q.diff().max())
    return varlen_reference.varlen_attn(
        query, key[shortened], value[shortened], cu_seq_q, cu_seq_q, longest, longest, window_size=window_size, **options
    )


def noisy(*inputs: Any, **options: Any) -> Any:
    """A kernel that computes with five bits fewer than its inputs have."""
    output = varlen_reference.varlen_attn(*inputs, **options)
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    return (output * (1 + 32 * torch.finfo(output.dtype).eps * noise)).to(output.dtype)


def absent(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no kernel image is available for execution on the device")


def nan(query: torch.Tensor, *_: Any, **__: Any) -> Any:
    return torch.full_like(query, torch.nan)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "deepseek_v3", "gpt2"])
def test_right_kernel_is_chosen(architecture: str, dtype: str) -> None:
    name, reason, warnings = chosen(open_decoder(architecture, dtype=dtype), varlen_reference.varlen_attn)
    assert (name, reason, warnings) == ("packed", "the packed path agrees with the universal one", [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", [shifted, top_left, noisy, nan, absent])
def test_broken_kernel_leads_to_the_universal_path_with_a_warning(kernel: Kernel, dtype: str) -> None:
    name, reason, warnings = chosen(open_decoder("mistral", dtype=dtype), kernel)
    assert name == "universal"
    assert [reason] == [f"not packed: {warning}" for warning in warnings]


def test_reason_tells_by_how_much_it_differs() -> None:
    _, reason, _ = chosen(open_decoder("llama"), noisy)
    assert re.fullmatch(
        r"not packed: relative errors of \S+ \(median\) and \S+ \(99th percentile\) against the universal path, allowed \S+ and \S+", reason
    )


def test_model_that_cannot_be_packed_is_not_even_tried() -> None:
    assert chosen(open_decoder("gemma2"), absent) == ("universal", "not packed: its attention has softcap", ["its attention has softcap"])


def test_cpu_is_served_by_the_universal_path_quietly() -> None:
    assert chosen(open_decoder("llama"), None) == ("universal", "the packed path does not run on cpu", [])


def test_kernel_is_not_tried_in_a_dtype_that_it_does_not_compute_in() -> None:
    assert _kernel_refusal(packable_decoder("llama")) == "the kernel computes in float16 and bfloat16, not in float32"


def test_a_model_on_several_devices_is_left_to_the_universal_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "is_spread", True)
    name, reason, warnings = chosen(packable_decoder("llama"), varlen_reference.varlen_attn)
    assert (name, reason, warnings) == ("universal", "not packed: the model is on several devices", ["the model is on several devices"])
