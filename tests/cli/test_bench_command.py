"""``probescore bench`` against a real server: everything that is sent is answered and counted."""

from __future__ import annotations

import json

import numpy as np
from models import BOS, VOCAB_SIZE

from probescore_server.cli.bench import BenchLoad

SMALL = (
    "--calls",
    "3",
    "--concurrency",
    "2",
    "--completions",
    "2",
    "--prompt-tokens",
    "6",
    "--completion-tokens",
    "4",
    "--first-id",
    str(BOS),
)


def load(**changed: int) -> BenchLoad:
    settings = {"calls": 2, "concurrency": 1, "groups": 3, "completions": 2, "prompt_tokens": 10, "completion_tokens": 7, "seed": 0}
    return BenchLoad(**(settings | {"first_id": None} | changed))


def test_every_token_is_counted(probescore):
    ran = probescore("bench", *SMALL, "--json")

    numbers = json.loads(ran.stdout)
    settings = {"prompt_tokens": 6, "completion_tokens": 4, "first_id": BOS, "groups": 1}
    groups = [group for call in range(3) for group in load(**settings).call(call, VOCAB_SIZE)]
    sent = sum(len(group.prompt) * len(group.completions) + sum(map(len, group.completions)) for group in groups)
    assert ran.returncode == 0, ran.stderr
    assert numbers["tokens_computed"] + numbers["tokens_shared"] + numbers["tokens_cached"] == sent
    assert 0 < numbers["latency_seconds"]["p50"] <= numbers["latency_seconds"]["p99"]
    assert numbers["load"]["calls"] == 3


def test_a_table_for_people(probescore):
    ran = probescore("bench", *SMALL, "--probe", "cheating", "--token-scores")

    assert "3 calls of 1 × 2 rollouts, 2 at a time" in ran.stdout
    for fact in ("cpu (float32, universal)", "calls/s", "p50", "computed", "queued"):
        assert fact in ran.stdout


def test_a_call_that_fails_is_one_clear_line(probescore):
    # given probes that expect BOS
    ran = probescore("bench", *SMALL[:-2])

    assert ran.returncode == 2
    assert "must start with BOS (1)" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_load_is_the_same_for_the_same_seed_and_within_its_lengths():
    first, again, other = load().call(1, 50), load().call(1, 50), load(seed=1).call(1, 50)
    assert [group.prompt.tolist() for group in first] == [group.prompt.tolist() for group in again]
    assert [group.prompt.tolist() for group in first] != [group.prompt.tolist() for group in other]
    assert [len(group.completions) for group in first] == [2, 2, 2]
    assert all(5 <= len(group.prompt) <= 15 and np.max(group.prompt) < 50 for group in first)
    assert all(3 <= len(completion) <= 10 for group in first for completion in group.completions)


def test_every_prompt_begins_with_the_first_id():
    assert {int(group.prompt[0]) for group in load(first_id=7).call(0, 50)} == {7}
