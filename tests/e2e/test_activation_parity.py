"""Activations out of the engine are those of plain Hugging Face, at every hook of every block, in whatever company they are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from parity_bound import BOUND
from parity_cases import EVERY_TAP, GROUPS, in_deviations, rollouts
from parity_models import write_model
from parity_reference import Reference

from probescore.types import CompletionActivations
from probescore_server import Engine

READ_AT_EVERY_HOOK = ("llama", "gpt2", "gpt_neox", "bloom", "gemma2", "mistral", "qwen3_next", "deepseek_v3", "gpt_oss")
"""Attention with and without a window, with latent keys and recurrent; norms before and after; additions inside modules; experts."""


@pytest.mark.parametrize("architecture", READ_AT_EVERY_HOOK)
def test_activations_equal_plain_hugging_face(architecture: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, architecture)
    reference = Reference(model)
    engine = Engine.load(str(model), taps=EVERY_TAP)
    whole = [*engine.activations(GROUPS, EVERY_TAP, pool=("tokens", "mean", "last", "max"))]
    # one rollout after the other, as a small bound makes it
    longest = max(len(prefix) + len(own) for prefix, own in rollouts()) * engine.info.model.hidden_size * 4 * len(EVERY_TAP)
    apart = [*engine.activations(GROUPS, EVERY_TAP, pool=("tokens", "mean", "last", "max"), max_batch_bytes=longest)]
    for results in (whole, apart):
        found = [view for result in results for view in _tree(result)]
        for tap in EVERY_TAP:
            plain = [reference.activations([*prefix, *own])[tap][len(prefix) :] for prefix, own in rollouts()]
            assert _in_deviations(np.concatenate([view.tokens[tap] for view in found]), np.concatenate(plain)) <= BOUND, tap
            pools = np.stack([[rows.mean(axis=0, dtype=np.float64), rows[-1], rows.max(axis=0)] for rows in plain])
            assert _in_deviations(np.stack([view.pooled[tap][0] for view in found]), pools) <= BOUND, tap


def _in_deviations(found: np.ndarray, plain: np.ndarray) -> float:
    """Largest difference, as a multiple of the standard deviation over tokens and features."""
    return in_deviations(found.reshape(-1, 1), plain.reshape(-1, 1))


def _tree(found: CompletionActivations) -> Iterator[CompletionActivations]:
    yield found
    for follow_up in found.follow_ups:
        yield from _tree(follow_up)
