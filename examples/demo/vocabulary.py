"""The tokenizer: one token a word, 17 words, saved as a Hugging Face tokenizer that ``AutoTokenizer`` reads."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ("<unk>", "<bos>", "<eos>", "sort", "cache", "answer", "?", *"0123456789")


def build_tokenizer(further: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """With ``further`` words after those of the task.

    Like most tokenizers of language models it puts BOS in front when special tokens are asked for, and never EOS at the end.
    """
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate((*WORDS, *further))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", WORDS.index("<bos>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")
