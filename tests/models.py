"""Tiny models for tests, from config, each with a tokenizer and a chat template; written once a session and shared by everyone.

Weights keep the size of what passes through them, and queries and keys are larger still: with the usual initialisation (σ = 0.02)
attention is flat, and a model that reads the wrong context would score nearly the same.
"""

from __future__ import annotations

import atexit
import functools
import math
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 96
PAD, BOS, EOS, UNK = range(4)
HIDDEN_SIZE = 32
LAYERS = 4
MAX_POSITIONS = 512

_ATTENTION_GAIN = 1.6
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} {{ message['role'] }} {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)


@functools.cache
def tiny_model(architecture: str = "llama", *, seed: int = 0, layers: int = LAYERS, sliding_window: int | None = None) -> Path:
    """A directory with config, safetensors and tokenizer of a model with a language-model head, as on the hub.

    Token ids: ``PAD, BOS, EOS, UNK``, then words ``w4 … w95``, with ``user`` and ``assistant`` last.
    """
    config = AutoConfig.for_model(
        architecture,
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **({} if sliding_window is None else {"sliding_window": sliding_window}),
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _scale_weights(model, torch.Generator().manual_seed(seed))
    directory = Path(_session_directory(), f"{architecture}-{seed}-{layers}-{sliding_window}")
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def tiny_tokenizer(*, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Words split at whitespace; with special tokens, a text begins with BOS."""
    words = [f"w{i}" for i in range(4, vocab_size - 2)] + ["user", "assistant"]
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", chat_template=_CHAT_TEMPLATE
    )


@functools.cache
def _session_directory() -> str:
    directory = tempfile.TemporaryDirectory(prefix="probescore-models-")
    atexit.register(directory.cleanup)
    return directory.name


@torch.no_grad()
def _scale_weights(model: torch.nn.Module, random: torch.Generator) -> None:
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=random)
        if weight.ndim == 1:
            weight.add_(0.1 * noise)
        elif "embed" in name or "wte" in name or "wpe" in name:
            weight.copy_(noise)
        else:
            gain = _ATTENTION_GAIN if "q_proj" in name or "k_proj" in name or "c_attn" in name else 1.0
            weight.copy_(gain * noise / math.sqrt(min(weight.shape[-2:])))
