"""Reads features of sparse autoencoders of the library SAELens, versions 5 and 6: ``cfg.json`` and ``sae_weights.safetensors`` in a folder.

    before = (norm(x) - b_dec if apply_b_dec_to_input) · W_enc + b_enc
    standard   relu(before)            jumprelu   relu(before) where before > threshold            topk   relu of the k largest

A configuration is interpreted as SAELens does. A setting that needs more than the file, or activations that no tap (place in the model)
has, is refused by name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probescore.types import ScoreUnit
from probescore_probes import arguments
from probescore_probes.exporting import torch_probe
from probescore_probes.importing.imported import Array, Imported, ImportOptions, named
from probescore_probes.importing.places import read_place
from probescore_probes.importing.source import ProbeSource, flag_in, nothing_more, settings_in, taken, whole_number

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_ARCHITECTURES = ("standard", "jumprelu", "topk")
_PARTS = ("W_enc", "b_enc", "W_dec", "b_dec", "scaling_factor")  # the last one changes only what is decoded
_LAYER_NORM_EPS = 1e-5
_MAY_BE_PLAIN = ("none", "layer_norm", "constant_norm_rescale")
_NOT_FOLDED = {
    "expected_average_only_in": "its factor is not in the file: fold it into the weights (fold_activation_norm_scaling_factor) and save",
    "covariance_whitening": "its matrix is not in the file: fold it into the weights (fold_activation_whitening) and save",
}


class Features(nn.Module):
    """Torch module that computes some features of a sparse autoencoder: from activations ``(N, d_in)`` to ``(N, features)``."""

    threshold: Tensor | None
    features: Tensor

    def __init__(
        self,
        w_enc: Array,
        b_enc: Array,
        b_dec: Array,
        threshold: Array | None,
        top: int | None,
        features: list[int],
        normalise: str,
        centre: bool,
    ) -> None:
        super().__init__()
        every = np.arange(w_enc.shape[1]) if top is not None else np.array(features)  # only the largest of all can be told from the others
        self.encoder = nn.Linear(*w_enc[:, every].shape)
        self.encoder.load_state_dict(
            {"weight": torch.from_numpy(w_enc[:, every].T.copy()), "bias": torch.from_numpy((b_enc - b_dec @ w_enc)[every])}
        )
        self.normalise, self.top, self.centre = normalise, top, centre
        self.register_buffer("threshold", None if threshold is None else torch.from_numpy(threshold[every]).float())
        self.register_buffer("features", torch.tensor(features))

    def forward(self, x: Tensor) -> Tensor:
        """Computes the chosen features of a sparse autoencoder, ``(N, features)``, from activations ``(N, d_in)``."""
        if self.centre:
            x = x - x.mean(-1, keepdim=True)
        if self.normalise == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
            x = x / ((x * x).sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt().add(_LAYER_NORM_EPS)
        elif self.normalise == "constant_norm_rescale":
            x = x * (x.shape[-1] ** 0.5 / (x * x).sum(-1, keepdim=True).sqrt())
        before: Tensor = self.encoder(x)
        if self.top is not None:
            values, indices = before.topk(self.top, dim=-1)
            return torch.zeros_like(before).scatter(-1, indices, values.relu())[:, self.features]
        return before.relu() if self.threshold is None else before.relu() * (before > self.threshold)


def is_sae(source: ProbeSource) -> bool:
    """Returns whether a folder holds ``cfg.json`` and ``sae_weights.safetensors``, the files of a sparse autoencoder of the library
    SAELens.
    """
    return source.holds(_CONFIG, _WEIGHTS)


def read_sae(source: ProbeSource, asked: ImportOptions) -> Imported:
    """Reads the features of a sparse autoencoder that the user asks for, as a probe with one score column for each feature.

    Raises:
        ValueError: the user names no feature, the autoencoder's kind, hook (place in the model) or normalisation is not supported, or its
            weights have another shape than its configuration says.
    """
    config = _settings(source.config(_CONFIG))
    architecture = config.get("architecture", "standard")
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"{_CONFIG}: architecture: {arguments.shown(architecture)}; only {', '.join(_ARCHITECTURES)} can be imported: "
            "for another kind, write its encoder as a torch module and use torch_probe"
        )
    _check_plain(config)
    place = read_place(str(config.get("hook_name")), f"{_CONFIG}: hook_name", asked.num_hidden_layers)
    d_in, d_sae = whole_number(config, "d_in", _CONFIG), whole_number(config, "d_sae", _CONFIG)
    if d_in != asked.hidden_size:
        raise ValueError(f"{_CONFIG}: d_in: {d_in}; the model's hidden size is {asked.hidden_size}: give the model that it was trained on")
    features = _features(asked, d_sae)
    centre, notes = _centred(config, asked)
    found = source.member(_WEIGHTS).tensors
    nothing_more(found, (*_PARTS, *(["threshold"] if architecture == "jumprelu" else [])), _WEIGHTS, f"a {architecture} autoencoder")
    top = _top(config, d_sae) if architecture == "topk" else None
    w_enc, b_enc = taken(found, "W_enc", _WEIGHTS, d_in, d_sae), taken(found, "b_enc", _WEIGHTS, d_sae)
    if flag_in(config, "rescale_acts_by_decoder_norm", _CONFIG, False):
        norms = np.linalg.norm(taken(found, "W_dec", _WEIGHTS, d_sae, d_in), axis=-1)
        w_enc, b_enc = w_enc * norms, b_enc * norms
    module = Features(
        w_enc,
        b_enc,
        taken(found, "b_dec", _WEIGHTS, d_in) if config["apply_b_dec_to_input"] else np.zeros(d_in),
        taken(found, "threshold", _WEIGHTS, d_sae) if architecture == "jumprelu" else None,
        top,
        features,
        config["normalize_activations"],
        centre,
    )
    if config.get("model_name"):
        notes.append(f"It was trained on {config['model_name']}, by its own name of it")
    if config.get("dtype") not in (None, "float32", "torch.float32"):
        notes.append(f"SAELens computes it in {config['dtype']}, this file in float32")
    return Imported(
        torch_probe(module, unit=ScoreUnit.VALUE),
        asked.tap_or((place.tap,), _CONFIG),
        f"features of a {architecture} sparse autoencoder",
        named(asked, len(features), [f"feature_{feature}" for feature in features]),
        expects_bos=config["prepend_bos"],
        notes=tuple(notes),
    )


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration of the library SAELens as one mapping with the names of SAELens 6, filled with the defaults of the SAELens
    version that wrote the configuration.
    """
    metadata = settings_in(config, "metadata", _CONFIG)
    before_6 = "metadata" not in config
    renamed = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
    settings = {renamed.get(key, key): value for key, value in config.items()}
    settings = {key: value for key, value in metadata.items() if value is not None} | settings
    if settings.get("activation_fn") == "topk" and before_6:
        settings |= {"architecture": "topk", "k": settings_in(settings, "activation_fn_kwargs", _CONFIG).get("k")}
    normalise = settings.get("normalize_activations") or "none"
    settings["normalize_activations"] = "expected_average_only_in" if normalise is True else normalise
    settings["apply_b_dec_to_input"] = flag_in(settings, "apply_b_dec_to_input", _CONFIG, True)
    if before_6 or settings.get("prepend_bos") is not None:
        settings["prepend_bos"] = flag_in(settings, "prepend_bos", _CONFIG, True)
    else:
        settings["prepend_bos"] = None
    return settings


def _centred(config: dict[str, Any], asked: ImportOptions) -> tuple[bool, list[str]]:
    """Returns whether a sparse autoencoder was fitted on activations that the library TransformerLens had centred, with notes for the
    manifest (description) in the probe's file.

    If the model has layer norms, centring subtracts the mean of each activation vector and changes nothing else.
    """
    kwargs = config.get("model_from_pretrained_kwargs")
    if not isinstance(kwargs, dict):
        return False, [
            "cfg.json does not say how the model was loaded: SAELens' list of releases loads some of GPT-2's with "
            "center_writing_weights; if this is one, put that into model_from_pretrained_kwargs of cfg.json"
        ]
    if not kwargs.get("center_writing_weights"):
        return False, []
    if not asked.layer_norms:
        return False, ["center_writing_weights does nothing to a model without layer norms"]
    return True, ["Its model was loaded with center_writing_weights: the mean of each row is taken out in the graph"]


def _check_plain(config: dict[str, Any]) -> None:
    hook = str(config.get("hook_name"))
    if config.get("reshape_activations", "none") != "none" or hook.endswith("_z"):
        raise ValueError(f"{_CONFIG}: hook_name: {hook} with heads side by side, before they are added up: no tap reads there")
    if config.get("hook_head_index") is not None:
        raise ValueError(f"{_CONFIG}: hook_head_index: {config['hook_head_index']}: reads one head, where no tap is")
    normalise = config["normalize_activations"]
    if normalise not in _MAY_BE_PLAIN:
        remedy = _NOT_FOLDED.get(str(normalise), f"only {', '.join(_MAY_BE_PLAIN)} can be imported")
        raise ValueError(f"{_CONFIG}: normalize_activations: {arguments.shown(normalise)}; {remedy}")
    if config.get("activation_fn", "relu") not in ("relu", "topk"):
        raise ValueError(f"{_CONFIG}: activation_fn: {arguments.shown(config['activation_fn'])}; only relu and topk can be imported")


def _top(config: dict[str, Any], d_sae: int) -> int:
    """Returns how many features of each token a top-k sparse autoencoder keeps."""
    top = whole_number(config, "k", _CONFIG)
    if not 0 < top <= d_sae:
        raise ValueError(f"{_CONFIG}: k: {top}; it should be 1 to {d_sae}, the number of features")
    return top


def _features(asked: ImportOptions, d_sae: int) -> list[int]:
    if not asked.features:
        raise ValueError(f"feature: none given; the autoencoder has {d_sae:,}: give the indices of those to score, 0 to {d_sae - 1}")
    for feature in asked.features:
        if not 0 <= feature < d_sae:
            raise ValueError(f"feature: {feature}; the autoencoder has {d_sae:,}: give 0 to {d_sae - 1}")
    if len({*asked.features}) < len(asked.features):
        raise ValueError(f"feature: {', '.join(map(str, asked.features))}: one comes twice; give each once")
    return list(asked.features)
