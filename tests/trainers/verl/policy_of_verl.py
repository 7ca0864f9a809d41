"""In the place of verl's LLM servers: the tiny model, sampled by transformers in the agent loop's own process."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput


class TinyPolicy(LLMServerClient):
    """Samples up to ``response_length`` tokens."""

    _model: PreTrainedModel | None = None

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> TokenOutput:
        if self._model is None:
            self._model = AutoModelForCausalLM.from_pretrained(self.config.actor_rollout_ref.model.path)
        ids = torch.tensor([prompt_ids])
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=self.config.actor_rollout_ref.rollout.response_length
        )
        return TokenOutput(token_ids=out[0, len(prompt_ids) :].tolist(), stop_reason="completed")
