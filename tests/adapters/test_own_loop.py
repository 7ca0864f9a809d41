"""A loop of one's own: the example runs as it stands in the docs, and batches are read whatever holds them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import BOS
from running_server import RunningServer

from probescore import InvalidRequestError
from probescore_adapters import ProbeScorer, ProbeSignal, Rollout, score_rollouts

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "trainers"))

from own_loop import train


def test_loop_of_ones_own_trains_on_what_the_probe_says(model: Path, served: RunningServer) -> None:
    outcome = train(str(model), served.address, steps=2)
    assert not outcome.unscorable.any()
    np.testing.assert_array_equal(outcome.terms, -2.0 * outcome.flagged["cheating"])


def test_batches_come_in_whatever_a_loop_has(served: RunningServer) -> None:
    """Given generators, tensors with gradients, bfloat16 and None, then the outcome is that of plain lists."""
    prompts, completions = [[BOS, 5, 6]] * 4, [[7, 8], [9, 10], [11], [12, 13, 14]]
    masks, rewards, groups = [[1, 0], [1, 1], [1], [0, 1, 1]], [0.5, -1.0, 0.25, 2.0], [0, 0, 1, 1]
    scorer = ProbeScorer(ProbeSignal("cheating", mode="reward"), served.address)
    plain = score_rollouts(scorer, prompts, completions, masks=masks, task_rewards=rewards, groups=groups)
    others = score_rollouts(
        scorer,
        (torch.tensor(prompt) for prompt in prompts),
        (np.array(completion, np.int32) for completion in completions),
        masks=(torch.tensor(mask, dtype=torch.bfloat16, requires_grad=True) for mask in masks),
        task_rewards=torch.tensor(rewards, dtype=torch.bfloat16, requires_grad=True),
        groups=torch.tensor(groups),
    )
    np.testing.assert_allclose(others.rewards, plain.rewards, rtol=1e-6)


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "a mask": ({"masks": [[1], [1, -100]]}, r"^masks\[1\]\[1\]: a mask holds 0 and 1, got -100$"),
    "a mask of padding": ({"masks": torch.ones(2, 5)}, r"^masks\[0\]: 5 entries for 1 tokens$"),
    "no completion": ({"completions": [[5], None]}, r"^completions\[1\]: expected token ids, got None$"),
    "ids that are none": ({"completions": [[5], [0.5, 1]]}, r"^completions\[1\]: token ids must be integers"),
    "no prompt": ({"prompts": [[5], None]}, r"^prompts\[1\]: expected token ids, got None$"),
    "a reward": ({"task_rewards": [1.0, None]}, r"^task_rewards\[1\]: expected a number, got None$"),
    "rewards": ({"task_rewards": [1.0]}, r"^task_rewards: must be 2 finite numbers"),
    "a group": ({"groups": [object(), 1]}, r"^groups\[0\]: object is no key of a group"),
    "groups": ({"groups": 3}, r"^groups: expected one for each rollout, got int$"),
}


@pytest.mark.parametrize(("given", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_read_is_refused_by_the_name_it_was_given_by(given: dict[str, object], said: str) -> None:
    """Without a server: nothing is asked."""
    rows: dict[str, object] = {"prompts": [[5], [6]], "completions": [[7], [8, 9]], **given}
    with pytest.raises(InvalidRequestError, match=said):
        score_rollouts(ProbeScorer(ProbeSignal("cheating"), "127.0.0.1:1"), **rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("holder", [list, np.array, torch.tensor, lambda keys: [torch.tensor(key) for key in keys], iter])
def test_group_of_which_screening_leaves_one_is_removed_whatever_holds_the_keys(served: RunningServer, holder: Any) -> None:
    """Given two groups of three with different prompts each, of which one keeps a single rollout."""
    scorer = ProbeScorer(ProbeSignal("cheating", mode="reward"), served.address)
    prompts, completions = [[BOS, 5 + index] for index in range(6)], [[20 + index, 30] for index in range(6)]
    values = score_rollouts(scorer, prompts, completions).values["cheating"]
    order = np.argsort(values)
    # the two highest of all are flagged, and are in one group with the lowest
    groups = np.zeros(6, int)
    groups[order[[0, 4, 5]]] = 1
    screen = ProbeSignal("cheating", mode="screen", threshold=float(values[order[3:5]].mean()))
    outcome = score_rollouts(ProbeScorer(screen, served.address), prompts, completions, groups=holder(groups.tolist()))
    assert outcome.removed.tolist() == (groups == 1).tolist()
    assert outcome.metrics["probescore/guard/degenerate_group"] == 1


def test_joined_ids_are_cut_by_the_length_of_the_completion() -> None:
    for length, prompt, completion in ((2, [5, 6], [7, 8]), (0, [5, 6, 7, 8], []), (4, [], [5, 6, 7, 8])):
        rollout = Rollout.joined([5, 6, 7, 8], length, [1] * length)
        assert (list(rollout.prompt), list(rollout.completion)) == (prompt, completion)  # type: ignore[arg-type]
    for length in (-1, 5):
        with pytest.raises(ValueError, match=rf"^completion_length: {length} is not in \[0, 4\]"):
            Rollout.joined([5, 6, 7, 8], length)


def test_joined_completion_without_a_token_is_unscorable(served: RunningServer) -> None:
    outcome = ProbeScorer(ProbeSignal("cheating", mode="reward"), served.address).score([Rollout.joined([5, 6, 7, 8], 0, [])])
    assert outcome.unscorable.tolist() == [True]
