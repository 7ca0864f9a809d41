"""Reads ``adapter_config.json`` as PEFT writes it, and refuses, by name, every setting that is not computed here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from probescore_server.errors import ReadingRefused

CONFIG_FILE = "adapter_config.json"

_MAX_PATTERNS = 10_000
_MAX_PATTERN_LENGTH = 1_000

# Ways of initialising that leave the base's weights as they are. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) train on a changed base:
# unless it was converted when it was saved, such an adapter is wrong on the base that is served, and nothing would show it.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

_WITHOUT_EFFECT = frozenset({
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "lora_dropout",
    "megatron_core", "qalora_group_size", "layers_pattern", "eva_config", "corda_config", "loftq_config", "lora_ga_config",
    "velora_config", "runtime_config", "modules_to_save", "exclude_modules",
})  # fmt: skip

_READ = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules", "layers_to_transform",
    "init_lora_weights", "bias", "ensure_weight_tying",
})  # fmt: skip

# What a setting means that must be off, for the refusal.
_MUST_BE_OFF = {
    "lora_bias": "a bias beside B is not computed",
    "fan_in_fan_out": "layers that store their weight transposed (Conv1D) are not adapted",
    "trainable_token_indices": "trained rows of the embedding are not read",
    "target_parameters": "adapters of bare parameters, such as experts', are not computed",
    "layer_replication": "the adapter's model repeats blocks",
    "alora_invocation_tokens": "an adapter that begins at a token is not computed",
    "arrow_config": "routing between adapters is not computed",
    "kasa_config": "KaSA changes the base's weights",
    "monteclora_config": "sampled adapters are not computed",
    "use_bdlora": "block-diagonal adapters are not computed",
    "use_qalora": "adapters of grouped inputs are not computed",
    "megatron_config": "Megatron's layers are not adapted",
}


@dataclass(frozen=True)
class AdapterConfig:
    """Value object with the settings of a LoRA adapter that change what it computes.

    Attributes:
        rank: rank of layers that no entry of ``rank_pattern`` names.
        alpha: numerator of the scale, of layers that no entry of ``alpha_pattern`` names.
        rank_pattern: a dictionary from patterns of layers' names to their rank.
        alpha_pattern: a dictionary from patterns of layers' names to their alpha.
        rank_stabilised: whether the scale is ``alpha / √rank`` instead of ``alpha / rank``.
        weight_decomposed: whether the updated weight's rows are scaled to trained magnitudes (DoRA).
        target_modules: the layers that were trained: endings of their names, a regular expression over their whole names, or
            ``all-linear``.
        excluded: as ``target_modules``, of layers that were not trained.
        layers: indices of the blocks that were trained; ``None`` = all.
        ties_embedding: whether what was trained of the head was trained of the embedding, too.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    weight_decomposed: bool
    target_modules: tuple[str, ...] | str
    excluded: tuple[str, ...] | str
    layers: tuple[int, ...] | None
    ties_embedding: bool

    @classmethod
    def parse(cls, content: bytes) -> AdapterConfig:
        """Reads the content of ``adapter_config.json``.

        Raises:
            ReadingRefused: a setting has a value that is not computed, or is unknown and set; the error names the setting.
        """
        settings = _settings(content)
        kind = settings.get("peft_type")
        if kind != "LORA":
            raise _refused("peft_type", kind, "'LORA'", "other kinds of adapters are not computed")
        for name, value in settings.items():
            if name in _MUST_BE_OFF and value not in (None, False, [], {}, ""):
                raise _refused(name, value, "none", _MUST_BE_OFF[name])
            if name not in _MUST_BE_OFF and name not in _READ and name not in _WITHOUT_EFFECT and value not in (None, False, [], {}, ""):
                raise _refused(name, value, "none", "this setting is unknown, and may change what the adapter computes")
        if settings.get("bias", "none") != "none":
            raise _refused("bias", settings["bias"], "'none'", "trained biases are not read")
        initialised = settings.get("init_lora_weights", True)
        if not any(initialised is known or (isinstance(known, str) and initialised == known) for known in _INITIALISATIONS):
            remedy = "the adapter was trained on a changed base: save it converted (path_initial_model_for_weight_conversion)"
            raise _refused("init_lora_weights", initialised, "an initialisation that leaves the base as it is", remedy)
        layers = settings.get("layers_to_transform")
        return cls(
            rank=_number(settings, "r", whole=True),
            alpha=_number(settings, "lora_alpha"),
            rank_pattern={key: int(value) for key, value in _patterns(settings, "rank_pattern", whole=True).items()},
            alpha_pattern=_patterns(settings, "alpha_pattern"),
            rank_stabilised=_flag(settings, "use_rslora"),
            weight_decomposed=_flag(settings, "use_dora"),
            target_modules=_names(settings, "target_modules"),
            excluded=_names(settings, "exclude_modules"),
            layers=None if layers is None or layers == [] else tuple(_indices(layers)),
            ties_embedding=_flag(settings, "ensure_weight_tying"),
        )

    @staticmethod
    def written(settings: Mapping[str, Any]) -> dict[str, Any]:
        """Returns those settings of PEFT's that say what an adapter computes, or that must be off and are not; the others, such as the
        place where the base was, are left out.
        """
        without_effect = _WITHOUT_EFFECT - {"exclude_modules"}
        return {name: value for name, value in settings.items() if name not in without_effect and value not in (None, False, [], {}, "")}

    @property
    def meaning(self) -> str:
        """Returns the settings that change what the tensors mean, in one form however the file spells them."""
        ranks, alphas = ([[key, float(value)] for key, value in each.items()] for each in (self.rank_pattern, self.alpha_pattern))
        return json.dumps([self.rank, self.alpha, ranks, alphas, self.rank_stabilised, self.weight_decomposed])

    def ranks_of(self, name: str) -> frozenset[int]:
        """Returns the ranks that a layer may have, by the name that it had in the model that was trained: several if several patterns name
        it, since the file has lost the order in which training tried them.
        """
        return frozenset(_of_patterns(self.rank_pattern, name) or {self.rank})

    def scale_of(self, name: str, rank: int) -> float:
        """Returns the factor of a layer's update ``B · A``.

        Args:
            name: the name that the layer had in the model that was trained.
            rank: its rank.

        Raises:
            ReadingRefused: several patterns name the layer and say different things.
        """
        alphas = _of_patterns(self.alpha_pattern, name) or {self.alpha}
        if len(alphas) > 1:
            problem = f"several patterns mean {name}, which say {', '.join(f'{alpha:g}' for alpha in sorted(alphas))}"
            raise ReadingRefused(f"{CONFIG_FILE}: alpha_pattern", f"{problem}: which one counted is lost when PEFT sorts them to save them")
        (alpha,) = alphas
        return float(alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)

    def targets(self, name: str, layer: int | None, *, is_linear: bool) -> bool:
        """Returns whether a module was trained.

        Args:
            name: the name that it had in the model that was trained.
            layer: index of its block; ``None`` = in no block.
            is_linear: whether it is a linear layer.
        """
        if not is_linear or _named(self.excluded, name):
            return False
        if self.layers is not None and layer not in self.layers:
            return False
        return self.target_modules == "all-linear" or _named(self.target_modules, name)


def matches(pattern: str, name: str) -> bool:
    """Returns whether a key of ``rank_pattern`` or ``alpha_pattern`` means a layer, as PEFT decides it."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _of_patterns(patterns: Mapping[str, float], name: str) -> set[Any]:
    return {value for pattern, value in patterns.items() if matches(pattern, name)}


def _named(targets: tuple[str, ...] | str, name: str) -> bool:
    if isinstance(targets, str):
        return bool(targets) and re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _settings(content: bytes) -> dict[str, Any]:
    try:
        settings = json.loads(content)
    except ValueError:
        raise ReadingRefused(CONFIG_FILE, "not JSON") from None
    if not isinstance(settings, dict):
        raise ReadingRefused(CONFIG_FILE, "not a JSON object")
    return settings


def _refused(name: str, found: object, expected: str, reason: str) -> ReadingRefused:
    return ReadingRefused(f"{CONFIG_FILE}: {name}", f"found {_shown(found)}, expected {expected}: {reason}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _number(settings: Mapping[str, Any], name: str, *, whole: bool = False) -> Any:  # noqa: ANN401 - int or float, as asked for
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or (whole and value != int(value)):
        raise _refused(name, value, "a whole number" if whole else "a number", "without it the update's size is unknown")
    if whole and value < 1:
        raise _refused(name, value, "at least 1", "an adapter has a rank")
    return int(value) if whole else float(value)


def _flag(settings: Mapping[str, Any], name: str) -> bool:
    value = settings.get(name)
    if value not in (None, False, True):
        raise _refused(name, value, "true or false", "it changes what the adapter computes")
    return bool(value)


def _patterns(settings: Mapping[str, Any], name: str, *, whole: bool = False) -> dict[str, float]:
    written = settings.get(name) or {}
    if not isinstance(written, dict) or len(written) > _MAX_PATTERNS:
        raise _refused(name, written, f"at most {_MAX_PATTERNS} patterns", "it says the size of layers' updates")
    for pattern in written:
        try:
            if len(pattern) > _MAX_PATTERN_LENGTH:
                raise re.error("too long")
            re.compile(f"({pattern})")
        except re.error as error:
            raise _refused(name, pattern, "a regular expression", str(error)) from None
    return {pattern: _number(written, pattern, whole=whole) for pattern in written}


def _names(settings: Mapping[str, Any], name: str) -> tuple[str, ...] | str:
    written = settings.get(name) or ()
    if isinstance(written, str):
        try:
            re.compile(written)
        except re.error as error:
            raise _refused(name, written, "a regular expression, or a list of names", str(error)) from None
        return written
    if not isinstance(written, (list, tuple)) or not all(isinstance(each, str) for each in written):
        raise _refused(name, written, "a list of names", "it says which layers were trained")
    return tuple(written)


def _indices(written: object) -> list[int]:
    entries = written if isinstance(written, list) else [written]
    indices = [each for each in entries if isinstance(each, int) and not isinstance(each, bool)]
    if len(indices) != len(entries):
        raise _refused("layers_to_transform", written, "indices of blocks", "it says which blocks were trained")
    return indices
