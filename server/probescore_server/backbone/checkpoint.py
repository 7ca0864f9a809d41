"""Checks a checkpoint's directory before any weight is read: whether it is complete, and under which names its embedding is stored."""

from __future__ import annotations

from pathlib import Path

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedConfig

from probescore_server.errors import ModelRefused

HEAD_NAMES = r"^(.+\.)?(lm_head|embed_out)\.weight$"
"""Matches the names under which checkpoints store the head of a language model."""

_ADAPTER = "adapter_config.json"


def check_is_whole(directory: Path) -> None:
    """Checks that what the weights in a directory compute does not depend on an adapter beside them.

    Transformers adds an adapter to the weights where peft is installed, and leaves it out silently where peft is not installed.

    Raises:
        ModelRefused: there is an adapter in the directory.
    """
    if (directory / _ADAPTER).is_file():
        raise ModelRefused(
            f"{directory.name}: {_ADAPTER} says that an adapter belongs to this model; merge it into the weights "
            "(peft: AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload().save_pretrained(…)) and serve what that writes, or "
            f"remove {_ADAPTER} if the base alone is meant"
        )


def tied_embedding(config: PreTrainedConfig) -> tuple[str, str] | None:
    """Returns the names of the head's and the embedding's weight in a model that uses one tensor for both, of which a checkpoint may store
    either.

    Returns:
        A pair such as ``("lm_head.weight", "model.embed_tokens.weight")``; ``None`` if there are two tensors, or the architecture does not
        tell.
    """
    if not any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config(decoder=True))):
        return None
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            tied = getattr(mapping[type(config)], "_tied_weights_keys", None)
            if isinstance(tied, dict):
                return next(((head, embedding) for head, embedding in tied.items()), None)
    return None
