"""The probes, rollouts and plain forward passes that readings are compared on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import varlen_reference
from numpy.typing import NDArray
from parity_models import BOS, HIDDEN, LAYERS, VOCAB_SIZE
from transformers import PreTrainedModel

from probescore import RolloutGroup
from probescore.types import ScoreResult
from probescore_probes.exporting import linear_probe
from probescore_probes.reference import ReferenceModel
from probescore_probes.writing import write_probe
from probescore_server import Engine
from probescore_server.backbone import selection

TAPS = {"early": "resid_post.0", "middle": f"resid_post.{LAYERS - 2}", "last": f"resid_post.{LAYERS - 1}", "normed": "final_norm"}
"""The probes' names, and where each reads."""

BOUND = 1e-4
"""Of the standard deviation of the reference's scores."""

_random = np.random.default_rng(3)


def _ids(length: int) -> list[int]:
    return [int(token) for token in _random.integers(4, VOCAB_SIZE, length)]


_PROMPT = [BOS, *_ids(12)]
ROLLOUTS = [(_PROMPT, [_ids(1), _ids(17), _ids(30)]), (_PROMPT, [_ids(9)]), ([BOS, *_ids(30)], [_ids(14), _ids(5)])]
GROUPS = [RolloutGroup(prompt, completions) for prompt, completions in ROLLOUTS]
GOLDEN = [([BOS, *_ids(9)], _ids(20))]

Array = NDArray[np.float64]


def direction(name: str) -> NDArray[np.float32]:
    """The weights of a probe."""
    random = np.random.default_rng([*TAPS].index(name))
    return (random.standard_normal(HIDDEN) / HIDDEN**0.5).astype(np.float32)


def write_probes(directory: Path, model: Path, names: Sequence[str] = tuple(TAPS)) -> list[Path]:
    """Writes linear probes of a model."""
    reference = ReferenceModel.load(model)
    paths = []
    for name in names:
        paths.append(directory / f"{name}.onnx")
        write_probe(paths[-1], linear_probe(direction(name)), reference, name=name, version="1", taps=[TAPS[name]], golden=GOLDEN)
    return paths


@dataclass(frozen=True, eq=False)
class Served:
    """A tiny model with probes of the whole of it, and engines of them."""

    model: Path
    folder: Path
    probes: dict[str, Path] = field(default_factory=dict)

    def probe(self, name: str) -> Path:
        if name not in self.probes:
            (self.probes[name],) = write_probes(self.folder, self.model, [name])
        return self.probes[name]

    def engine(self, *names: str, **options: object) -> Engine:
        return Engine.load(str(self.model), [self.probe(name) for name in names or TAPS], **options)

    def packed_engine(self, *names: str, **options: object) -> Engine:
        """An engine on the packed path, with torch's documented kernel in plain torch."""
        choose = selection.choose_backbone
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("probescore_server.engine.loading.choose_backbone", lambda *parts: choose(*parts, varlen_reference.varlen_attn))
            engine = self.engine(*names, **options)
        assert engine.info.execution_path == "packed"
        return engine


def both(engine: Engine, *names: str) -> ScoreResult:
    """The scores of all rollouts on the frozen model and others."""
    return engine.score(GROUPS, token_scores="all", readings=("frozen", *(names or ("policy",))))


def token_scores(result: ScoreResult, probe: str, reading: str = "frozen") -> Array:
    """All token scores of an answer, of one probe on one reading, ``(tokens,)``."""
    found = [scored.on(reading)[probe].tokens for group in result.groups for scored in group]
    return np.concatenate([tokens[:, 0] for tokens in found if tokens is not None]).astype(np.float64)


@torch.no_grad()
def plain_scores(model: PreTrainedModel, names: Sequence[str] = tuple(TAPS)) -> dict[str, Array]:
    """What probes say of the same tokens by plain Hugging Face, one sequence at a time; a model of PEFT's will do."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    decoder = inner.get_decoder()
    seen: dict[str, torch.Tensor] = {}

    def keep(_module: torch.nn.Module, _args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        seen["last"] = output if isinstance(output, torch.Tensor) else output[0]

    blocks = decoder.h if hasattr(decoder, "h") else decoder.layers
    hook = blocks[-1].register_forward_hook(keep)
    scores: dict[str, list[Array]] = {name: [] for name in names}
    for prompt, completions in ROLLOUTS:
        for completion in completions:
            ids = torch.tensor([[*prompt, *completion]])
            output = decoder(ids, use_cache=False, output_hidden_states=True)
            found = {f"resid_post.{layer}": output.hidden_states[layer + 1] for layer in range(LAYERS - 1)}
            found |= {f"resid_post.{LAYERS - 1}": seen["last"], "final_norm": output.last_hidden_state}
            for name in names:
                rows = found[TAPS[name]][0, -len(completion) :].double().numpy()
                scores[name].append(rows @ direction(name).astype(np.float64))
    hook.remove()
    return {name: np.concatenate(parts) for name, parts in scores.items()}


def deviations(found: ScoreResult, expected: dict[str, Array], reading: str) -> dict[str, float]:
    """By probe, the largest difference in standard deviations of the expected scores."""
    return {name: float(np.abs(token_scores(found, name, reading) - own).max() / own.std()) for name, own in expected.items()}
