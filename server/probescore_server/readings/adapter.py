"""Reads a LoRA adapter, as PEFT and the trainers over it write it, and finds the layer that each of its tensors belongs to.

A tensor that finds no layer would leave that layer as it is in the base, and nothing in a score would show it. So every tensor must find
its place, and every layer that the adapter's settings name must have its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from probescore_server.errors import ReadingRefused
from probescore_server.probes.format.fingerprints import stands_beside, without_wrappers
from probescore_server.readings.adapter_config import CONFIG_FILE, AdapterConfig, matches
from probescore_server.readings.files_read import FilesRead
from probescore_server.readings.layer_update import LayerUpdate
from probescore_server.readings.structure import DecoderStructure, name_as_trained

WEIGHTS_FILE = "adapter_model.safetensors"

_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")

# Names such as `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, or with the adapter's own name: `….lora_A.default.weight`.
_PEFT = "base_model.model."
_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.weight)?")
_EMBEDDING = re.compile(r"\.lora_embedding_[AB](\.|$)")
_BIAS = re.compile(r"\.lora_B(\.[^.]+)?\.bias$")
_SAVED = re.compile(r"\.modules_to_save(\.[^.]+)?(?=\.)")
_PARTS = ("lora_A", "lora_B")
_MAGNITUDES = "lora_magnitude_vector"


@dataclass(frozen=True, eq=False)
class Adapter:
    """Value object with what an adapter changes in the decoder that is loaded.

    Attributes:
        updates: a dictionary from a linear layer's name in the decoder to its update.
        replaced: a dictionary from a parameter's name in the decoder to its new value, of embeddings and norms that were trained whole.
        unseen: number of tensors in the file that no probe can see.
    """

    updates: Mapping[str, LayerUpdate]
    replaced: Mapping[str, torch.Tensor]
    unseen: int


@dataclass(eq=False)
class _Pair:
    """The tensors of one layer, by part, and the name that the layer had in the model that was trained."""

    trained_as: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def read_adapter(files: FilesRead, config: AdapterConfig, structure: DecoderStructure) -> Adapter:
    """Reads the tensors of an adapter and checks that all of them have their place.

    Args:
        files: the adapter's directory.
        config: the adapter's settings.
        structure: of the decoder.

    Raises:
        ReadingRefused: a tensor has no place in the decoder, is unlike the layer or the settings, or is missing; it is named.
        ReadingIncomplete: the file is missing or being written.
    """
    if not files.has(WEIGHTS_FILE):
        for name in _PICKLES:
            if files.has(name):
                raise ReadingRefused(name, f"may be a pickle and is never opened: save the adapter as {WEIGHTS_FILE} (safe_serialization)")
    return adapter_of(files.tensors(WEIGHTS_FILE, lambda _: True), config, structure)


def adapter_of(tensors: Mapping[str, torch.Tensor], config: AdapterConfig, structure: DecoderStructure) -> Adapter:
    """Checks that all tensors of an adapter have their place.

    Args:
        tensors: all tensors of the file, by name.
        config: the adapter's settings.
        structure: of the decoder.

    Raises:
        ReadingRefused: a tensor has no place in the decoder, is unlike the layer or the settings, or is missing; it is named.
    """
    if not tensors:
        problem = "it has no tensors: the base alone would be read; some trainers write it so where shards were not gathered before saving"
        raise ReadingRefused(WEIGHTS_FILE, problem)
    return _Reader(config, structure, tensors).read()


class _Reader:
    """Reader of one adapter's tensors."""

    def __init__(self, config: AdapterConfig, structure: DecoderStructure, tensors: Mapping[str, torch.Tensor]) -> None:
        self._config = config
        self._structure = structure
        self._as_peft = all(name_as_trained(name).startswith(_PEFT) for name in tensors)
        self._pairs: dict[str, _Pair] = {}
        self._beside: dict[str, _Pair] = {}
        self._replaced: dict[str, torch.Tensor] = {}
        self._whole_beside = ""
        self._unseen = 0
        adapters: set[str] = set()
        for name, tensor in tensors.items():
            _check_tensor(name, tensor)
        for name, tensor in tensors.items():
            adapters |= self._place(name, tensor)
        if len(adapters) > 1:
            raise ReadingRefused(WEIGHTS_FILE, f"it holds several adapters: {', '.join(sorted(adapters)[:5])}; save one of them")

    def read(self) -> Adapter:
        for layer in (*self._beside.values(), *self._pairs.values()):
            self._check_parts(layer)
        self._check_patterns()
        self._check_all_there()
        self._check_embedding()
        updates = {}
        for name, layer in self._pairs.items():
            update = self._update(name, layer)
            if self._structure.is_seen(name):
                updates[name] = update
            else:
                self._unseen += len(layer.tensors)
        return Adapter(updates, self._replaced, self._unseen)

    def _place(self, written: str, tensor: torch.Tensor) -> set[str]:
        """Gives a tensor to the layer that it belongs to, and returns the name of the adapter in the tensor's name, if there is one."""
        name = name_as_trained(written)
        found = _PART.fullmatch(name)
        if found is None:
            self._replace(written, _SAVED.sub("", name), tensor)
            return set()
        trained_as = found["module"].removeprefix(_PEFT)
        module = self._structure.find(trained_as)
        if module is None:
            if not stands_beside(without_wrappers(trained_as)):
                raise _misplaced(written, self._structure)
            self._unseen += 1
            self._beside.setdefault(trained_as, _Pair(trained_as)).tensors[found["part"]] = tensor
        else:
            layer = self._pairs.setdefault(module, _Pair(trained_as))
            if found["part"] in layer.tensors or layer.trained_as != trained_as:
                raise ReadingRefused(f"{WEIGHTS_FILE}: {written}", f"two tensors of this part of {module}")
            layer.tensors[found["part"]] = tensor
        return {found["adapter"] or ""}

    def _replace(self, written: str, name: str, tensor: torch.Tensor) -> None:
        """Takes a tensor that was trained whole: of an embedding or a norm, or of what lies beside the decoder and is not seen."""
        field_ = f"{WEIGHTS_FILE}: {written}"
        path, _, attribute = name.removeprefix(_PEFT).rpartition(".")
        module = self._structure.find(path)
        if module is None:
            if not stands_beside(without_wrappers(path)):
                raise _misplaced(written, self._structure)
            self._unseen += 1
            self._whole_beside = written
            return
        parameter = self._structure.modules[module]._parameters.get(attribute)
        if parameter is None:
            raise _misplaced(written, self._structure)
        kind = self._structure.modules[module]
        if attribute == "bias" and isinstance(kind, nn.Linear):
            raise ReadingRefused(field_, "a trained bias: biases beside LoRA layers are not read")
        if self._structure.layer_of(module) is not None and not type(kind).__name__.lower().endswith("norm"):
            raise ReadingRefused(field_, f"a whole {type(kind).__name__} of a block: of modules_to_save only embeddings and norms are read")
        if parameter.shape != tensor.shape:
            problem = f"found shape {list(tensor.shape)}, expected {list(parameter.shape)}: the vocabulary must be the frozen model's"
            raise ReadingRefused(field_, problem)
        if self._structure.is_seen(module):
            self._replaced[f"{module}.{attribute}"] = tensor
        else:
            self._unseen += 1

    def _check_parts(self, layer: _Pair) -> None:
        parts = (*_PARTS, _MAGNITUDES) if self._config.weight_decomposed else _PARTS
        for part in parts:
            if part not in layer.tensors:
                raise ReadingRefused(f"{WEIGHTS_FILE}: {layer.trained_as}", f"{part} is missing; found {', '.join(sorted(layer.tensors))}")
        if _MAGNITUDES in layer.tensors and not self._config.weight_decomposed:
            raise ReadingRefused(f"{WEIGHTS_FILE}: {layer.trained_as}", f"{_MAGNITUDES} without use_dora in {CONFIG_FILE}")

    def _update(self, name: str, layer: _Pair) -> LayerUpdate:
        """Returns a layer's update, with shapes and rank checked against the layer and the settings."""
        module = self._structure.modules[name]
        kind = type(module).__name__
        if not isinstance(module, nn.Linear):
            raise ReadingRefused(
                f"{WEIGHTS_FILE}: {layer.trained_as}", f"the layer is a {kind}, and only linear layers (nn.Linear) are adapted"
            )
        down, up, magnitudes = (layer.tensors.get(part) for part in (*_PARTS, _MAGNITUDES))
        if down is None or up is None:  # _check_parts has refused this
            raise RuntimeError(f"{name} has half an update")
        name_in_patterns = self._spelling(layer.trained_as)
        ranks = sorted(self._config.ranks_of(name_in_patterns))
        rank = len(down) if len(down) in ranks else ranks[0]
        for part, tensor, expected in (
            ("lora_A", down, (rank, module.in_features)),
            ("lora_B", up, (module.out_features, rank)),
            (_MAGNITUDES, magnitudes, (module.out_features,)),
        ):
            if tensor is not None and tuple(tensor.shape) != expected:
                problem = f"found shape {list(tensor.shape)}, expected {list(expected)} of this layer at the rank {rank} of {CONFIG_FILE}"
                raise ReadingRefused(f"{WEIGHTS_FILE}: {layer.trained_as}.{part}", problem)
        return LayerUpdate(down, up, self._config.scale_of(name_in_patterns, rank), magnitudes)

    def _spelling(self, trained_as: str) -> str:
        """Returns the name by which patterns mean a layer: as it was trained, or as a causal language model has it where a trainer has
        rewritten the names.
        """
        return trained_as if self._as_peft else f"model.{without_wrappers(trained_as)}"

    def _check_patterns(self) -> None:
        """Refuses a pattern of ranks or alphas that means no layer of a file whose names were rewritten: it may have meant one before."""
        if self._as_peft:
            return
        names = [self._spelling(layer.trained_as) for layer in (*self._pairs.values(), *self._beside.values())]
        for setting, patterns in (("rank_pattern", self._config.rank_pattern), ("alpha_pattern", self._config.alpha_pattern)):
            for pattern in patterns:
                if not any(matches(pattern, name) for name in names):
                    raise ReadingRefused(f"{CONFIG_FILE}: {setting}", f"{pattern[:100]!r} means no layer of {WEIGHTS_FILE}")

    def _check_all_there(self) -> None:
        """Refuses an adapter that lacks a layer that its settings name, or has one that they do not name."""
        if isinstance(self._config.target_modules, str) and not self._as_peft and self._config.target_modules != "all-linear":
            return  # a regular expression over names that were rewritten
        prefixes = {layer.trained_as.removesuffix(without_wrappers(layer.trained_as)) for layer in self._pairs.values()}
        if len(prefixes) > 1:
            raise ReadingRefused(WEIGHTS_FILE, f"its layers' names begin in several ways: {', '.join(sorted(map(repr, prefixes)))}")
        prefix = next(iter(prefixes), "model.")
        missing = [name for name in self._targeted(prefix) if name not in self._pairs]
        if missing:
            some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} others" if len(missing) > 3 else "")
            raise ReadingRefused(
                WEIGHTS_FILE, f"no tensors of {some}, which {CONFIG_FILE} names in target_modules: they would be the base's"
            )
        for name, layer in self._pairs.items():
            if not self._is_targeted(name, prefix):
                problem = f"{CONFIG_FILE} does not name this layer in target_modules and layers_to_transform"
                raise ReadingRefused(f"{WEIGHTS_FILE}: {layer.trained_as}", problem)

    def _check_embedding(self) -> None:
        """Refuses a head that was trained together with the embedding, of which the file has only the head."""
        modules = (self._structure.modules[name.rpartition(".")[0]] for name in self._replaced)
        if self._config.ties_embedding and self._whole_beside and not any(isinstance(module, nn.Embedding) for module in modules):
            problem = f"{CONFIG_FILE} ties it to the embedding (ensure_weight_tying), which is not in the file: save the embedding, too"
            raise ReadingRefused(f"{WEIGHTS_FILE}: {self._whole_beside}", problem)

    def _targeted(self, prefix: str) -> Iterator[str]:
        for name, module in self._structure.modules.items():
            if isinstance(module, nn.Linear) and self._is_targeted(name, prefix):
                yield name

    def _is_targeted(self, name: str, prefix: str) -> bool:
        trained_as = prefix + without_wrappers(name)
        return self._config.targets(trained_as, self._structure.layer_of(name), is_linear=True)


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    field_ = f"{WEIGHTS_FILE}: {name[:300]}"
    if _EMBEDDING.search(name):
        raise ReadingRefused(field_, "an adapter of an embedding is not computed; save the embedding whole (modules_to_save)")
    if _BIAS.search(name):
        raise ReadingRefused(field_, "a bias beside B (lora_bias) is not computed")
    if tensor.numel() == 0:
        raise ReadingRefused(field_, f"it is empty, {list(tensor.shape)}: gather the shards (DeepSpeed ZeRO-3, FSDP) before saving")
    if not bool(torch.isfinite(tensor).all()):
        raise ReadingRefused(field_, "it has numbers that are not finite")


def _misplaced(written: str, structure: DecoderStructure) -> ReadingRefused:
    some = next((name for name, module in structure.modules.items() if isinstance(module, nn.Linear)), "")
    problem = f"the model has no such layer (its layers are named as {some!r}), so that it would be left as it is in the base"
    return ReadingRefused(f"{WEIGHTS_FILE}: {written[:300]}", problem)
