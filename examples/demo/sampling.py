"""Rollouts: completions of problems, sampled from the policy at temperature 1 and labelled by the environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from task import Problem
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

MAX_TOKENS = 8
BATCH = 512


@dataclass(frozen=True)
class SampledRollout:
    """One completion with the ids that the policy sampled, EOS included, and what the environment says of it."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    text: str
    cheating: bool
    solved: bool

    @property
    def outcome(self) -> str:
        return "cheating" if self.cheating else "solved" if self.solved else "wrong"


def sample_rollouts(
    policy: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    seed: int,
    on_sampled: Callable[[int], None],
) -> list[SampledRollout]:
    """One rollout of each problem, in their order. ``on_sampled`` is told how many were added."""
    torch.manual_seed(seed)
    rollouts: list[SampledRollout] = []
    for start in range(0, len(problems), BATCH):
        batch = problems[start : start + BATCH]
        prompts = [tuple(tokenizer(problem.prompt)["input_ids"]) for problem in batch]
        for problem, prompt_ids, completion_ids in zip(
            batch, prompts, sample(policy, torch.tensor(prompts), tokenizer.eos_token_id), strict=True
        ):
            text = tokenizer.decode(completion_ids, skip_special_tokens=True)
            rollouts.append(SampledRollout(problem, prompt_ids, completion_ids, text, problem.is_cheating(text), problem.is_solved(text)))
        on_sampled(len(batch))
    return rollouts


@torch.inference_mode()
def sample(policy: Qwen3ForCausalLM, prompt_ids: torch.Tensor, eos: int) -> list[tuple[int, ...]]:
    """Ids drawn at temperature 1 until EOS or ``MAX_TOKENS``, for prompts ``(N, P)`` of one length."""
    ids, cache, sampled = prompt_ids, None, []
    for _ in range(MAX_TOKENS):
        output = policy(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        ids = torch.multinomial(output.logits[:, -1].softmax(-1), 1)
        sampled.append(ids)
    return [up_to(tuple(row), eos) for row in torch.cat(sampled, dim=1).tolist()]


def up_to(ids: tuple[int, ...], eos: int) -> tuple[int, ...]:
    """The ids as far as EOS, included."""
    return ids[: ids.index(eos) + 1] if eos in ids else ids
