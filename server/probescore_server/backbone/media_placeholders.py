"""Finds the token ids that stand for pictures, audio and video, which must not be scored as text.

Without such content in its place, the model reads a placeholder as a word that means nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_OTHER_THAN_TEXT = r"image|img|picture|video|frame|vision|visual|audio|speech|sound|media"
# `image_token_id`, `video_token_index`, `vision_start_token_id`, `boi_token_id` (begin of image), `eoa_token_index` (end of audio)
_SETTING = re.compile(rf"(\w+_)?(({_OTHER_THAN_TEXT})\w*|[be]o[iav])(_token)?_(id|index|ids)")
# `<image>`, `<|image_pad|>`, `<start_of_image>`, `[IMG_BREAK]`
_TOKEN = re.compile(rf"[<\[]\S*({_OTHER_THAN_TEXT})\S*[>\]]", re.IGNORECASE)


def placeholder_tokens(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> dict[int, str]:
    """Returns, by token id, the name of each placeholder: a token that stands for something other than text.

    Names are taken from the config, at any depth, and, if the model has encoders for other content beside its decoder, from the tokenizer
    too. The tokenizer alone does not tell: families of models share one tokenizer, and for a model of text alone such a token is a word.

    Args:
        config: config of the whole model.
        tokenizer: the model's tokenizer; ``None`` if it has none.
    """
    found = dict(_settings(config.to_dict()))
    if config.get_text_config(decoder=True) is not config and tokenizer is not None:
        tokens = {token: text.content for token, text in tokenizer.added_tokens_decoder.items()}
        tokens |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        found = {token: text for token, text in tokens.items() if token is not None and _TOKEN.fullmatch(text)} | found
    return {int(token): name for token, name in sorted(found.items())}


def _settings(settings: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _settings(value)
        elif _SETTING.fullmatch(str(name)):
            values = value if isinstance(value, (list, tuple)) else [value]
            yield from ((token, name) for token in values if isinstance(token, int) and not isinstance(token, bool) and token >= 0)
