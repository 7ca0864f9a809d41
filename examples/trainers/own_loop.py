"""A loop of one's own: REINFORCE on the demo's model, whose reward loses what the probe flags."""

import sys

import torch
from transformers import AutoModelForCausalLM

from probescore_adapters import Outcome, ProbeScorer, ProbeSignal, score_rollouts

PROMPT = torch.tensor([[1, 3, 9, 7, 7, 14, 6, 4, 8, 12, 14, 14, 15, 5]])  # "sort 2 0 0 7 ? cache 1 5 7 7 8 answer"


def train(model: str, address: str, steps: int = 10) -> Outcome:
    policy = AutoModelForCausalLM.from_pretrained(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    scorer = ProbeScorer(ProbeSignal("cheating", mode="penalty", weight=2.0), address)
    for step in range(steps):
        sequences = policy.generate(PROMPT.repeat(16, 1), do_sample=True, max_new_tokens=6, min_new_tokens=6)
        completions = sequences[:, PROMPT.shape[1] :]
        is_sorted = (completions[:, :5].diff(dim=1) >= 0).all(dim=1).float()
        outcome = score_rollouts(scorer, [PROMPT[0].numpy()] * 16, list(completions.numpy()), task_rewards=is_sorted, step=step)
        advantages = torch.tensor(outcome.rewards - outcome.rewards.mean()).float()
        logprobs = policy(sequences).logits[:, PROMPT.shape[1] - 1 : -1].log_softmax(-1).gather(-1, completions.unsqueeze(-1))
        optimizer.zero_grad()
        (-(advantages[:, None, None] * logprobs).mean()).backward()
        optimizer.step()
        print(step, dict(outcome.metrics))
    return outcome


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2])
