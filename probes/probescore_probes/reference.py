"""Computes reference activations with plain Hugging Face transformers, one sequence at a time, without padding, cache or early exit.

Authors fit probes on these activations and compute golden vectors (rollouts with scores of the author's code) from them. Nothing here is
shared with the server's engine, so that the golden vectors are an independent check of the engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from probescore.fingerprints import tokenizer_fingerprint
from probescore.types import Hook, Tap, TokenIds
from probescore_probes import arguments
from probescore_probes.adapters import BroughtAdapter, read_adapter, with_adapter
from probescore_probes.model_loading import find_model, is_wrapper, load_whole_model
from probescore_server.probes.format.fingerprints import model_fingerprint
from probescore_server.probes.format.manifest import ModelReference

_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|feed_?forward|ffn|moe|^fc2$")


@dataclass(frozen=True, eq=False)
class ReferenceModel:
    """Whole language model as transformers loads it, with its tokenizer and the facts that a probe's manifest states about both.

    Attributes:
        model: the model, with the adapter in its weights if there is one.
        tokenizer: its tokenizer.
        reference: the model as a manifest names it, without the adapter.
        tokenizer_fingerprint: digest of the tokenizer.
        adapter: the adapter that probes of this reference bring; ``None`` = none.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reference: ModelReference
    tokenizer_fingerprint: str
    adapter: BroughtAdapter | None = None

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        revision: str = "",
        model_id: str = "",
        dtype: torch.dtype | str = torch.float32,
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
    ) -> ReferenceModel:
        """Loads a language model and its tokenizer.

        Of a model that also reads pictures (Qwen2.5-VL, Mistral3, LLaVA, …), only the text decoder is used, on rollouts of text.

        Args:
            model: a directory, or the id of a model on the hub.
            revision: branch, tag or commit of a model on the hub; empty = its main branch.
            model_id: name of the model in the manifest; empty = the hub id, or the directory's name.
            dtype: dtype of the weights; golden vectors (rollouts with scores of the author's code) are made in float32, while a model that
                only gives activations to fit on may be less exact.
            device: device to load to, such as ``cuda:0``.
            trust_remote_code: whether the model may bring its own Python code, which is then run.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: ``model_id`` or ``revision`` is longer than a manifest allows.
            ModelRefused: there is no model of that name, its weights are incomplete or not in safetensors files, an adapter lies beside the
                weights, or the model has no tokenizer or is not a decoder.
        """
        trust_remote_code = arguments.flag(trust_remote_code, "trust_remote_code")
        directory, commit = find_model(model, revision)
        if commit:
            model_id, revision = model_id or str(model), commit
        named = arguments.text(model_id, "model_id", 256) or directory.resolve().name
        arguments.text(revision, "revision", 128)
        loaded, tokenizer = load_whole_model(directory, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        config = loaded.config.get_text_config(decoder=True)
        reference = ModelReference(
            id=named,
            revision=revision,
            fingerprint=model_fingerprint(directory),
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
        )
        return cls(loaded, tokenizer, reference, tokenizer_fingerprint(tokenizer))

    def adapted(self, adapter: Path | str) -> ReferenceModel:
        """Returns this model with a LoRA adapter in its weights, for probes that bring the adapter: they are fitted on its activations, and
        their golden vectors are computed from these. This model stays as it is.

        Weights that the adapter does not change are shared; the others take memory a second time.

        Args:
            adapter: directory that PEFT saved the adapter to, with ``adapter_config.json`` and ``adapter_model.safetensors``.

        Raises:
            TypeError: ``adapter`` is not a path.
            ValueError: the files cannot be read, a server would not compute the adapter correctly, or there is an adapter already.
        """
        if self.adapter is not None:
            raise ValueError("adapter: this reference has one in its weights already; give the reference that it was made of")
        brought = read_adapter(adapter)
        model = with_adapter(self.model, brought, _blocks_name(self.model.get_decoder(), self.reference.num_hidden_layers))
        return replace(self, model=model, adapter=brought)

    @property
    def vocabulary(self) -> arguments.Vocabulary:
        """Returns a description of the token ids that rollouts for this language model may have."""
        return _vocabulary(self.model)

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """Returns the ids of the tokenizer's special tokens, in order, which a probe with the setting ``exclude_special_tokens`` leaves out
        of the score of a rollout.
        """
        return tuple(sorted({int(token) for token in self.tokenizer.all_special_ids if token is not None}))

    def activations(self, token_ids: TokenIds, taps: Sequence[Tap | str]) -> dict[Tap, NDArray[np.float32]]:
        """Computes the activations of one sequence at some taps, points in the model such as ``"resid_post.6"``.

        Args:
            token_ids: ids of the sequence, ``(T,)``, used unchanged.
            taps: taps at which to read activations.

        Returns:
            Dictionary keyed by tap of activations, ``(T, hidden_size)`` float32.

        Raises:
            TypeError: an argument does not hold token ids or taps.
            ValueError: the model does not have an id or a tap, or cannot be run on the ids.
        """
        return reference_activations(self.model, token_ids, arguments.taps(taps, self.reference.num_hidden_layers))

    def completion_activations(
        self, rollouts: Sequence[tuple[TokenIds, TokenIds]], tap: Tap | str, progress: Callable[[int], None] | None = None
    ) -> list[NDArray[np.float32]]:
        """Computes the activations of each rollout's completion tokens, on which a probe is fitted.

        Args:
            rollouts: ``(prompt_ids, completion_ids)`` of each rollout, as sampled.
            tap: tap (point in the model) at which to read activations.
            progress: function called after each rollout with the number of finished rollouts.

        Returns:
            For each rollout ``(completion tokens, hidden_size)`` float32.

        Raises:
            TypeError: an argument does not hold rollouts, a tap or a function.
            ValueError: the model does not have an id or the tap, or cannot be run on the ids.
        """
        parsed = arguments.tap(tap, "tap", self.reference.num_hidden_layers)
        if progress is not None and not callable(progress):
            raise TypeError(
                f"progress: {arguments.kind_of(progress)} ({arguments.shown(progress)}); give a function of how many are done, or None"
            )
        read = list(arguments.rollouts(rollouts, "rollouts", self.vocabulary))  # all rollouts are checked before hours of computing
        activations = []
        for done, (prompt, completion) in enumerate(read, 1):
            ids = np.concatenate([prompt, completion])
            activations.append(reference_activations(self.model, ids, [parsed])[parsed][len(prompt) :])
            if progress is not None:
                progress(done)
        return activations


def reference_activations(model: PreTrainedModel, token_ids: TokenIds, taps: Sequence[Tap]) -> dict[Tap, NDArray[np.float32]]:
    """Runs one sequence through a whole model and returns its activations at some taps (points in the model).

    Residual streams come from ``output_hidden_states``, where entry ``i`` is the input of block ``i`` and the last entry is the output of
    the final norm. The output of the last block is in none of these entries and is read from the block itself. The terms that attention and
    MLP add are found as the outputs of two modules of the block whose sum with the block's input is the block's output.

    Args:
        model: a transformers model, with or without a head.
        token_ids: ids of the sequence, ``(T,)``, used unchanged.
        taps: taps at which to read activations.

    Returns:
        Dictionary keyed by tap of activations, ``(T, hidden_size)`` float32.

    Raises:
        TypeError: an argument is not a model, token ids or taps.
        ValueError: the model does not have an id or a tap, or cannot be run on the ids.
    """
    arguments.of_kind(model, "model", PreTrainedModel, "give the model of a ReferenceModel, or one from transformers' from_pretrained")
    config = model.config.get_text_config(decoder=True)
    decoder: torch.nn.Module = model.get_decoder()
    # The model runs without the head, whose logits would take more memory than all activations, but with all that a wrapper does to text.
    bare = model.base_model if is_wrapper(model.config) else decoder
    blocks = _decoder_blocks(decoder, config.num_hidden_layers)
    taps = arguments.taps(taps, len(blocks))
    checked = arguments.token_ids(token_ids, "token_ids", _vocabulary(model))
    ids = torch.as_tensor(checked).unsqueeze(0).to(model.device)
    read = {len(blocks) - 1} | {tap.layer for tap in taps if tap.layer is not None and tap.hook in (Hook.ATTN_OUT, Hook.MLP_OUT)}
    with torch.inference_mode(), _recorded(blocks, read) as outputs:
        try:
            hidden: Sequence[torch.Tensor] = bare(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        except Exception as error:  # whatever a model raises on what it cannot be run on
            longest = getattr(config, "max_position_embeddings", None)
            limit = f"; its config says max_position_embeddings = {longest}" if longest is not None and len(checked) > longest else ""
            raise ValueError(
                f"token_ids: {type(model).__name__} cannot read {len(checked)} ids ({type(error).__name__}){limit}; give shorter rollouts"
            ) from error
    if len(hidden) != len(blocks) + 1:
        raise ValueError(f"{type(model).__name__} gives {len(hidden)} hidden states for {len(blocks)} blocks")

    def activation(tap: Tap) -> torch.Tensor:
        match tap.hook, tap.layer:
            case Hook.FINAL_NORM, _:
                return hidden[-1][0]
            case Hook.RESID_PRE, int(layer):
                return hidden[layer][0]
            case Hook.RESID_POST, int(layer):
                return outputs[layer][""] if layer == len(blocks) - 1 else hidden[layer + 1][0]
            case ((Hook.ATTN_OUT | Hook.MLP_OUT), int(layer)):
                scale = getattr(config, "residual_multiplier", 1.0)
                attention, mlp = _added_terms(tap, hidden[layer][0], outputs[layer], scale)
                return attention if tap.hook == Hook.ATTN_OUT else mlp
        raise ValueError(f"{tap}: no such tap")

    return {tap: activation(tap).float().cpu().numpy() for tap in taps}


def _vocabulary(model: PreTrainedModel) -> arguments.Vocabulary:
    """Returns the token ids for which a model has an embedding, and which of them stand for pictures, videos or sound instead of text."""
    config = model.config
    placeholders = {}
    if is_wrapper(config):
        for kind in ("image", "video", "audio"):
            for key in (f"{kind}_token_id", f"{kind}_token_index"):
                if isinstance(getattr(config, key, None), int):
                    placeholders[getattr(config, key)] = kind
    return arguments.Vocabulary(len(model.get_input_embeddings().weight), placeholders)  # type: ignore[arg-type]


def _decoder_blocks(decoder: torch.nn.Module, count: int) -> torch.nn.ModuleList:
    blocks = decoder.get_submodule(_blocks_name(decoder, count))
    assert isinstance(blocks, torch.nn.ModuleList)  # noqa: S101
    return blocks


def _blocks_name(decoder: torch.nn.Module, count: int) -> str:
    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return str(name)
    raise ValueError(f"{type(decoder).__name__}: found no list of {count} decoder blocks")


@contextmanager
def _recorded(blocks: torch.nn.ModuleList, layers: set[int]) -> Iterator[dict[int, dict[str, torch.Tensor]]]:
    """Records, within the context, the outputs of some blocks and of the modules inside them while the model runs.

    Yields a dictionary keyed by layer of dictionaries keyed by module name of outputs, ``(T, …)``; the block itself has the empty name.
    """
    outputs: dict[int, dict[str, torch.Tensor]] = {layer: {} for layer in layers}
    handles = []
    for layer in layers:
        for name, module in blocks[layer].named_modules():

            def record(_module: torch.nn.Module, _args: object, output: object, layer: int = layer, name: str = name) -> None:
                first = output[0] if isinstance(output, tuple) else output
                if isinstance(first, torch.Tensor):
                    # The output is copied, since some architectures change the same tensor in place later.
                    outputs[layer][name] = first.reshape(-1, first.shape[-1]).clone()

            handles.append(module.register_forward_hook(record))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _added_terms(tap: Tap, entering: torch.Tensor, outputs: dict[str, torch.Tensor], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the outputs of an attention-like and an MLP-like module that together make a block's change of the residual stream.

    The two modules are found by trying which outputs have the right sum, since they depend on the architecture. Gemma 2 has a norm after
    each of the two, and BLOOM adds to the residual stream inside its attention.

    Raises:
        ValueError: no two outputs add up to the change of the residual stream.
    """
    change = (outputs[""] - entering).double()
    sized = {name: scale * output for name, output in outputs.items() if name and output.shape == entering.shape}
    pairs = [(sized[attention], sized[mlp]) for attention in sized if _ATTENTION.search(attention) for mlp in sized if _MLP.search(mlp)]
    errors = [float((change - attention.double() - mlp.double()).norm() / change.norm()) for attention, mlp in pairs]
    # The difference of two rounded residual streams is only as exact as they are large.
    rounding = float(outputs[""].double().norm() / change.norm()) * torch.finfo(entering.dtype).eps
    if not errors or min(errors) > 1e-4 + 4 * rounding:
        raise ValueError(f"{tap}: no attention and MLP output of this model's block add up to its change of the residual stream")
    return pairs[int(np.argmin(errors))]
