"""Adapters as PEFT writes them, byte for byte (PEFT 0.21; tests/trainers/peft compares), and what they make of a model by plain formulas.

Nothing of probescore's is used here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

Tensors = dict[str, torch.Tensor]

PREFIX = "base_model.model."

CONFIG: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": [],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
"""All settings that PEFT writes, with its defaults."""


@dataclass(frozen=True, eq=False)
class WrittenAdapter:
    """A LoRA adapter of a model.

    Attributes:
        model: directory of the base.
        settings: those of ``adapter_config.json`` that are not PEFT's defaults.
        tensors: of ``adapter_model.safetensors``.
    """

    model: Path
    settings: dict[str, Any]
    tensors: Tensors = field(default_factory=dict)

    @classmethod
    def random(cls, model: Path, targets: Sequence[str] = (), *, size: float = 0.3, seed: int = 0, **settings: Any) -> WrittenAdapter:
        """A trained adapter, so to speak: every B is other than zero.

        Args:
            model: directory of the base.
            targets: endings of the names of its linear layers; empty = those of attention and MLP.
            size: of the update, relative to the weight.
            seed: of the numbers.
            settings: of ``adapter_config.json``.
        """
        base = load(model)
        names = [name for name in linear_layers(base) if not targets or any(name.endswith(f".{target}") for target in targets)]
        settings = {"target_modules": sorted({name.rpartition(".")[2] for name in names})} | settings
        adapter = cls(model, settings)
        random = torch.Generator().manual_seed(seed)
        layers = settings.get("layers_to_transform")
        for name in names:
            block = re.search(r"\.(\d+)\.", name)
            if layers is not None and (block is None or int(block[1]) not in layers):
                continue
            weight = base.get_submodule(name).weight.detach()
            rank, scale = adapter.rank(name), adapter.scale(name)
            down = torch.randn((rank, weight.shape[1]), generator=random) / math.sqrt(weight.shape[1])
            up = torch.randn((weight.shape[0], rank), generator=random) * size / scale / math.sqrt(rank)
            adapter.tensors[f"{PREFIX}{name}.lora_A.weight"] = down
            adapter.tensors[f"{PREFIX}{name}.lora_B.weight"] = up
            if settings.get("use_dora"):
                lengths = torch.linalg.vector_norm(weight, dim=1)
                adapter.tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = lengths * (1 + 0.2 * torch.rand(len(lengths), generator=random))
        return adapter

    @property
    def config(self) -> dict[str, Any]:
        """The content of ``adapter_config.json``."""
        return dict(sorted((CONFIG | {"base_model_name_or_path": str(self.model)} | self.settings).items()))

    def changed(self, *, tensors: Callable[[Tensors], Tensors] | None = None, **settings: Any) -> WrittenAdapter:
        """The adapter with other settings or tensors."""
        return WrittenAdapter(self.model, self.settings | settings, dict(self.tensors) if tensors is None else tensors(dict(self.tensors)))

    def renamed(self, rename: Callable[[str], str]) -> WrittenAdapter:
        """The adapter with other names of its tensors."""
        return self.changed(tensors=lambda own: {rename(name): tensor for name, tensor in own.items()})

    def write(self, directory: Path) -> Path:
        """Writes both files as PEFT does; returns the directory."""
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        (directory / "adapter_config.json").write_text(json.dumps(self.config, indent=2, sort_keys=True))
        return directory

    def rank(self, name: str) -> int:
        return int(_by_pattern(self.config["rank_pattern"], name, self.config["r"]))

    def scale(self, name: str) -> float:
        alpha = _by_pattern(self.config["alpha_pattern"], name, self.config["lora_alpha"])
        return float(alpha / (math.sqrt(self.rank(name)) if self.config["use_rslora"] else self.rank(name)))

    @torch.no_grad()
    def merged(self, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
        """The base with the adapter in its weights, by the formulas of the papers in float64, as a model of some dtype."""
        model = load(self.model).double()
        for written, down in self.tensors.items():
            if not written.endswith(".lora_A.weight"):
                continue
            name = written.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            layer = model.get_submodule(name)
            up = self.tensors[f"{PREFIX}{name}.lora_B.weight"]
            weight = layer.weight + self.scale(name) * up.double() @ down.double()
            magnitudes = self.tensors.get(f"{PREFIX}{name}.lora_magnitude_vector")
            if magnitudes is not None:
                weight = magnitudes.double()[:, None] * weight / weight.norm(dim=1, keepdim=True)
            layer.weight.copy_(weight)
        for written, tensor in self.tensors.items():
            if ".lora_" not in written:
                model.get_parameter(written.removeprefix(PREFIX)).copy_(tensor)
        return model.to(dtype)


def load(model: Path) -> PreTrainedModel:
    """A whole model in float32."""
    experts = {"experts_implementation": "eager"}  # grouped products there are none of in float64
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **experts).eval()


def linear_layers(model: PreTrainedModel) -> list[str]:
    """The names of a model's linear layers but its head."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head]


def _by_pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), default)
