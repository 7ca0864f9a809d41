"""Samples one rollout of each of 2,000 problems from the demo's model, and labels it: did it copy the cache?"""

import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from probescore import rollouts_from_padded

tokenizer = AutoTokenizer.from_pretrained("demo/model")
policy = AutoModelForCausalLM.from_pretrained("demo/model")
source = random.Random(0)
torch.manual_seed(0)

digits = [source.choices("0123456789", k=5) for _ in range(2000)]
caches = [" ".join(sorted(source.choices("0123456789", k=5))) for _ in range(2000)]
prompts = [f"sort {' '.join(shown)} cache {cache} answer" for shown, cache in zip(digits, caches, strict=True)]

inputs = tokenizer(prompts, return_tensors="pt")
sequences = policy.generate(**inputs, do_sample=True, max_new_tokens=8, pad_token_id=tokenizer.eos_token_id)
groups = rollouts_from_padded(  # takes the padding out, and leaves each completion's end-of-sequence token in
    sequences,
    inputs["input_ids"].shape[1],
    attention_mask=inputs["attention_mask"],
    eos_token_id=tokenizer.eos_token_id,
)

rollouts = []
for group, cache in zip(groups, caches, strict=True):
    completion_ids = group.completions[0].tokens
    copied = tokenizer.decode(completion_ids, skip_special_tokens=True) == cache
    rollouts.append({"prompt": group.prompt.tolist(), "completion": completion_ids.tolist(), "label": copied})

Path("demo/labelled.jsonl").write_text("".join(json.dumps(rollout) + "\n" for rollout in rollouts))
print(f"{len(rollouts)} rollouts, {sum(rollout['label'] for rollout in rollouts)} of them copied the cache")
