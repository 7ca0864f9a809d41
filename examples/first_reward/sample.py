"""Samples 2,000 rollouts from the demo's model. The label says: did it copy the cache?"""

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

prompts, caches = [], []
for _ in range(2000):
    digits = source.choices("0123456789", k=5)
    cache = " ".join(sorted(source.choices("0123456789", k=5)))
    prompts.append(f"sort {' '.join(digits)} cache {cache} answer")
    caches.append(cache)

inputs = tokenizer(prompts, return_tensors="pt")
sequences = policy.generate(
    **inputs,
    do_sample=True,
    max_new_tokens=8,
    pad_token_id=tokenizer.eos_token_id,
)
groups = rollouts_from_padded(  # takes out the padding, leaves in the token that ends an answer
    sequences,
    inputs["input_ids"].shape[1],
    attention_mask=inputs["attention_mask"],
    eos_token_id=tokenizer.eos_token_id,
)

labels = []
with Path("demo/labelled.jsonl").open("w") as file:
    for group, cache in zip(groups, caches, strict=True):
        prompt, completion = group.prompt.tolist(), group.completions[0].tokens.tolist()
        copied = tokenizer.decode(completion, skip_special_tokens=True) == cache
        line = {"prompt": prompt, "completion": completion, "label": copied}
        file.write(json.dumps(line) + "\n")
        labels.append(copied)

print(f"{len(labels)} rollouts, {sum(labels)} of them copied the cache")
