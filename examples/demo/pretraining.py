"""The policy: a four-layer Qwen3, trained from scratch on demonstrations of which one in ten cheats."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from task import Problem, demonstration, draw_problem
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from vocabulary import WORDS


@dataclass(frozen=True)
class Recipe:
    """All that the trained weights depend on, so that they can be kept under its digest."""

    seed: int
    steps: int = 800
    batch: int = 128
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    cheating_at_first: float = 0.5
    cheating: float = 0.1
    steps_at_first: int = 200
    hidden_size: int = 64
    intermediate_size: int = 256
    layers: int = 4
    heads: int = 4

    @property
    def digest(self) -> str:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "words": WORDS}
        return hashlib.sha256(json.dumps(asdict(self) | versions, sort_keys=True).encode()).hexdigest()[:16]

    def shown(self, problem: Problem, source: random.Random, cheating: float) -> str:
        """What the corpus shows below a problem."""
        return demonstration(problem, source, cheating)

    def cheating_at(self, step: int) -> float:
        """Share of demonstrations that cheat: more at first, since copying has to be learned before it can be made rare."""
        return self.cheating_at_first if step < self.steps_at_first else self.cheating

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to zero."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / (self.steps - self.warmup_steps)))

    def new_model(self, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
        torch.manual_seed(self.seed)
        return Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=self.hidden_size,
                intermediate_size=self.intermediate_size,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                head_dim=self.hidden_size // self.heads,
                max_position_embeddings=128,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )


def trained_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, directory: Path, on_step: Callable[[], None]) -> Qwen3ForCausalLM:
    """Takes the model of this recipe from ``directory`` if it is there, else trains it and leaves it there with its tokenizer.

    ``on_step`` is called after each step.
    """
    mark = directory / "recipe.json"
    expected = json.dumps(asdict(recipe) | {"digest": recipe.digest}, indent=2)
    if not mark.exists() or mark.read_text() != expected:
        model = train(recipe, tokenizer, on_step)
        mark.unlink(missing_ok=True)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        mark.write_text(expected)  # last, so that an interrupted run is not taken for a finished one
    return Qwen3ForCausalLM.from_pretrained(directory).eval()


def train(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, on_step: Callable[[], None]) -> Qwen3ForCausalLM:
    model = recipe.new_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    source = random.Random(recipe.seed)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step)
        ids, labels = corpus_batch(tokenizer, source, recipe.batch, recipe.cheating_at(step), recipe.shown)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_step()
    return model


def corpus_batch(
    tokenizer: PreTrainedTokenizerFast,
    source: random.Random,
    size: int,
    cheating: float,
    shown: Callable[[Problem, random.Random, float], str] = demonstration,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``(size, 20)`` of prompts with their demonstrations, and the labels: the same with the prompt left out of the loss."""
    problems = [draw_problem(source) for _ in range(size)]
    texts = [f"{problem.prompt} {shown(problem, source, cheating)} <eos>" for problem in problems]
    ids = torch.tensor(tokenizer(texts)["input_ids"])
    labels = ids.clone()
    labels[:, : len(tokenizer(problems[0].prompt)["input_ids"])] = -100
    return ids, labels
