"""Answers of the model before training, sampled at temperature 1. The prompts are read once for all their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from claims import Claim
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prompt_ids(claims: Sequence[Claim], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [tokenizer(claim.prompt(tokenizer), add_special_tokens=False)["input_ids"] for claim in claims]


@torch.inference_mode()
def sample_answers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    samples: int,
    most_tokens: int,
    eos: int,
    generator: torch.Generator,
    on_done: Callable[[int], None],
) -> list[list[list[int]]]:
    """Ids of ``samples`` answers to each prompt, EOS included, of at most ``most_tokens`` each."""
    answers = []
    for prompt in prompts:
        read = model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        cache, logits = read.past_key_values, read.logits[:, -1].expand(samples, -1)
        cache.batch_repeat_interleave(samples)
        drawn = torch.empty(samples, 0, dtype=torch.long)
        while True:
            drawn = torch.cat([drawn, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
            if drawn.shape[1] == most_tokens or bool((drawn == eos).any(1).all()):
                break
            logits = model(input_ids=drawn[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
        answers.append([ids[: ids.index(eos) + 1] if eos in ids else ids for ids in drawn.tolist()])
        on_done(1)
    return answers
