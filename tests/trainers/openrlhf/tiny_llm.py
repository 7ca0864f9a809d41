"""What OpenRLHF asks of its vLLM engine, from a tiny Hugging Face model that really samples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class TinyLLM:
    """``await llm.generate(ids, sampling_params, multi_modal_data=…)`` as ``SingleTurnAgentExecutor`` calls it."""

    def __init__(self, model: Any) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._tokenizer = AutoTokenizer.from_pretrained(model)

    async def generate(self, prompt_token_ids: list[int], sampling_params: Any, multi_modal_data: Any = None) -> Any:
        assert multi_modal_data is None
        prompt = torch.tensor([prompt_token_ids])
        with torch.inference_mode():
            sequence = self._model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=sampling_params.max_tokens, pad_token_id=0
            )[0]
        ids = sequence[len(prompt_token_ids) :].tolist()
        finished = "length" if len(ids) == sampling_params.max_tokens else "stop"
        return SimpleNamespace(
            outputs=[SimpleNamespace(token_ids=ids, text=self._tokenizer.decode(ids), finish_reason=finished, logprobs=None)]
        )


def counts_even_words(queries: list[str], prompts: list[str], labels: list[Any]) -> dict[str, Any]:
    """A reward of the task, as OpenRLHF takes it: the share of even words; below 0 for a label that is ``"bad"``."""
    words = queries[0][len(prompts[0]) :].split()
    share = sum(word[1:].isdigit() and int(word[1:]) % 2 == 0 for word in words) / len(words)
    return {"rewards": torch.tensor([-share if labels[0] == "bad" else share])}
