"""``ProbeScorer`` against a real server: what reaches it, what comes back, and what happens when something fails."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import pickle
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import BOS, VOCAB_SIZE
from running_server import RunningServer, start_server

from probescore import Chat, DeadlineExceededError, InvalidRequestError, MismatchError, UnavailableError
from probescore_adapters import GuardRails, Policy, ProbeScorer, ProbeSignal, Rollout, SignalError, Unscorable, score_rollouts
from probescore_adapters.job import job_from_environment
from probescore_probes import ReferenceModel

RAW = ProbeSignal("cheating", mode="reward")
random = np.random.default_rng(1)


def ids(count: int) -> np.ndarray:
    return random.integers(4, VOCAB_SIZE, count)


PROMPTS = [np.array([BOS, *ids(5)]) for _ in range(3)]
ROLLOUTS = [Rollout(prompt, ids(4 + index)) for prompt in PROMPTS for index in range(2)]


def scorer(served: RunningServer, *signals: ProbeSignal, **options: Any) -> ProbeScorer:
    return ProbeScorer(signals or (RAW,), served.address, rails=GuardRails(clip=1e6), **options)


@pytest.fixture(scope="session")
def expected(model: Path, probe_files: list[Path]) -> np.ndarray:
    """The mean of the first probe over each rollout, by plain Hugging Face."""
    reference = ReferenceModel.load(model)
    pairs = [(list(map(int, rollout.prompt)), list(map(int, rollout.completion))) for rollout in ROLLOUTS]  # type: ignore[arg-type, union-attr]
    rng = np.random.default_rng(0)
    for _ in range(2):
        rng.integers(4, VOCAB_SIZE, 5), rng.integers(4, VOCAB_SIZE, 7)
    rng.standard_normal(100)
    weight = rng.standard_normal(32)
    return np.array([float((rows @ weight).mean()) for rows in reference.completion_activations(pairs, "resid_post.1")])


def test_values_are_those_of_plain_hugging_face(served: RunningServer, expected: np.ndarray) -> None:
    outcome = scorer(served).score(ROLLOUTS)
    assert np.abs(outcome.terms - expected).max() <= 1e-4 * expected.std()


async def test_event_loop_gets_the_same(served: RunningServer) -> None:
    one = scorer(served)
    np.testing.assert_array_equal((await one.score_async(ROLLOUTS)).terms, scorer(served).score(ROLLOUTS).terms)
    await one.close_async()


def test_scorer_serves_several_loops_one_after_the_other(served: RunningServer) -> None:
    one = scorer(served)
    found = [asyncio.run(one.score_async(ROLLOUTS)).terms for _ in range(2)]
    np.testing.assert_array_equal(*found)


def test_signals_share_one_call_and_a_prompt_is_computed_once(served: RunningServer) -> None:
    signals = (
        ProbeSignal("cheating", mode="reward", name="mean"),
        ProbeSignal("cheating", mode="reward", reduction="max", name="max"),
        ProbeSignal("mood", mode="reward", label="angry", mask="all"),
    )
    rollouts = [Rollout(PROMPTS[0], ids(6), mask=[1, 1, 0, 0, 1, 1]), Rollout(PROMPTS[0], ids(4), mask=[1, 0, 1, 1])]
    before = len(served.events("scored"))
    outcome = scorer(served, *signals).score(rollouts)
    served.wait_for("scored", count=before + 1)  # logged once the answer is on its way
    calls = served.events("scored")[before:]
    assert len(calls) == 1
    # a completion goes once with its mask and once without, and is computed once
    assert calls[0]["completions"] == 4
    assert calls[0]["tokens_computed"] <= len(PROMPTS[0]) + 6 + 4
    alone = [scorer(served, one).score(rollouts).terms for one in signals]
    np.testing.assert_allclose(outcome.terms, sum(alone), rtol=1e-5)


def test_masks_are_the_trainers_everything_or_a_functions(served: RunningServer) -> None:
    completion, mask = ids(6), np.array([1, 1, 0, 0, 1, 1])

    def value(mask_of_signal: Any, given: Any) -> float:
        one = scorer(served, ProbeSignal("cheating", mode="reward", mask=mask_of_signal))
        return float(one.score([Rollout(PROMPTS[0], completion, given)]).terms[0])

    first_half = np.array([1, 1, 1, 0, 0, 0])
    assert value("given", mask) == value(lambda _: mask, None)
    assert value("all", mask) == value("given", None)
    assert value(lambda _: first_half, mask) == value("given", first_half & mask)
    assert value("given", mask) != value("all", mask)


def test_text_is_scored_and_flagged_inexact(served: RunningServer) -> None:
    chat = Chat.of([{"role": "user", "content": "w5 w6"}])
    outcome = scorer(served).score([Rollout(chat, "w7 w8"), Rollout(PROMPTS[0], ids(3))])
    assert np.isfinite(outcome.terms).all()
    assert outcome.metrics["probescore/inexact_ids"] == 0.5


def test_dense_tokens_are_the_probes(served: RunningServer) -> None:
    completion = ids(5)
    outcome = scorer(served, ProbeSignal("cheating", mode="dense")).score([Rollout(PROMPTS[0], completion, [1, 1, 0, 1, 1])])
    whole = scorer(served).score([Rollout(PROMPTS[0], completion, [1, 1, 0, 1, 1])]).terms[0]
    assert outcome.dense is not None
    assert outcome.dense[0][2] == 0
    assert outcome.dense[0].sum() / 4 == pytest.approx(whole, rel=1e-5)


def test_own_loop_has_numpy_in_and_out(served: RunningServer) -> None:
    prompts = [rollout.prompt for rollout in ROLLOUTS]
    completions = [rollout.completion for rollout in ROLLOUTS]
    outcome = score_rollouts(scorer(served), prompts, completions, task_rewards=np.ones(len(ROLLOUTS)))  # type: ignore[arg-type]
    np.testing.assert_allclose(outcome.rewards, 1 + scorer(served).score(ROLLOUTS).terms)
    with pytest.raises(ValueError, match="masks: 1 for 6 prompts"):
        score_rollouts(scorer(served), prompts, completions, masks=[[1]])  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- what cannot be scored

UNSCORABLE = {
    "too long": Rollout(PROMPTS[0], ids(300)),
    "outside of the vocabulary": Rollout(PROMPTS[0], [5, VOCAB_SIZE]),
    "empty": Rollout(PROMPTS[0], []),
    "nothing counts": Rollout(PROMPTS[0], [5, 6], mask=[0, 0]),
    "half of a surrogate pair": Rollout(PROMPTS[0], "\ud800"),
    "too long as text": Rollout("w5 " * 400, "w6"),
}


@pytest.mark.parametrize("broken", UNSCORABLE.values(), ids=UNSCORABLE.keys())
def test_unscorable_rollout_gets_the_worst_and_its_neighbours_their_scores(served: RunningServer, broken: Rollout) -> None:
    penalty = ProbeSignal("cheating", transform="sigmoid")
    undisturbed = scorer(served, penalty).score(ROLLOUTS).terms
    outcome = scorer(served, penalty).score([*ROLLOUTS[:2], broken, *ROLLOUTS[2:]])
    np.testing.assert_allclose(np.delete(outcome.terms, 2), undisturbed, rtol=1e-5)
    assert outcome.terms[2] == -1.0
    assert outcome.unscorable.tolist() == [False, False, True, False, False, False, False]


def test_unscorable_raises_if_told_to(served: RunningServer) -> None:
    with pytest.raises(Unscorable, match=r"rollout 1: 306 tokens; the limit is 200"):
        scorer(served, policy=Policy(on_unscorable="raise")).score([ROLLOUTS[0], UNSCORABLE["too long"]])


def test_mask_of_another_length_is_the_callers_mistake(served: RunningServer) -> None:
    with pytest.raises(InvalidRequestError, match="mask"):
        scorer(served).score([ROLLOUTS[0], Rollout(PROMPTS[0], ids(4), mask=[1, 1])])


def test_ids_that_are_no_integers_are_the_callers_mistake(served: RunningServer) -> None:
    with pytest.raises(ValueError, match=r"rollouts\[0\]\.completion: token ids must be integers, got float64"):
        scorer(served).score([Rollout(PROMPTS[0], [1.5, 2.0])])  # type: ignore[list-item]


# ------------------------------------------------------------------------------------------------------------------ what fails


def test_batch_above_the_servers_limit_is_sent_in_several_calls(model: Path, probe_files: list[Path], served: RunningServer) -> None:
    with start_server(model, probe_files, max_request_tokens=24, max_rollout_tokens=24) as small:
        np.testing.assert_allclose(scorer(small).score(ROLLOUTS).terms, scorer(served).score(ROLLOUTS).terms, rtol=1e-4)


def test_server_that_is_not_there_follows_the_policy() -> None:
    gone = "127.0.0.1:1"
    # whichever comes first
    errors = (UnavailableError, DeadlineExceededError)
    with pytest.raises(errors):
        ProbeScorer(RAW, gone, policy=Policy(timeout=0.5)).score(ROLLOUTS)
    with pytest.raises(errors):
        ProbeScorer(RAW, gone, policy=Policy(on_failure="wait", wait_seconds=0.5)).score(ROLLOUTS)
    outcome = ProbeScorer(RAW, gone, policy=Policy(on_failure=-3.0, timeout=0.5)).score(ROLLOUTS, np.ones(6))
    assert outcome.rewards.tolist() == [-2.0] * 6
    assert outcome.metrics["probescore/failures"] == 1.0


def test_worker_killed_in_the_middle_changes_no_reward(model: Path, probe_files: list[Path], served: RunningServer) -> None:
    rollouts = [Rollout(PROMPTS[0], ids(150)) for _ in range(64)]
    undisturbed = scorer(served).score(rollouts).terms
    with start_server(model, probe_files, max_rollout_tokens=200, max_batch_tokens=512, worker_restart_seconds=0.1) as fragile:

        async def disturbed() -> np.ndarray:
            one = scorer(fragile)
            await one.score_async(rollouts[:1])
            scoring = asyncio.create_task(one.score_async(rollouts))
            await asyncio.sleep(0.05)
            assert not scoring.done()
            os.kill(fragile.worker_pid(), signal.SIGKILL)
            return (await scoring).terms

        np.testing.assert_allclose(asyncio.run(disturbed()), undisturbed, rtol=1e-4)


def test_another_model_behind_the_address_is_an_error(model: Path, probe_files: list[Path], served: RunningServer) -> None:
    one = scorer(served)
    one.score(ROLLOUTS[:1])
    assert one._server is not None
    one._server = replace(one._server, info=replace(one._server.info, model=replace(one._server.info.model, fingerprint="another")))
    with pytest.raises(MismatchError, match="expected_model_fingerprint"):
        one.score(ROLLOUTS[:1])


def test_server_with_another_tokenizer_is_refused(served: RunningServer) -> None:
    with pytest.raises(MismatchError, match="expected_tokenizer_fingerprint"):
        scorer(served, tokenizer_fingerprint="another").score(ROLLOUTS)


def test_probe_that_is_not_loaded_is_an_error_whatever_the_policy(served: RunningServer) -> None:
    with pytest.raises(SignalError, match="probe: 'absent': it is not loaded; the server has cheating@1, mood@1"):
        scorer(served, ProbeSignal("absent"), policy=Policy(on_failure=0.0)).score(ROLLOUTS)


@pytest.mark.parametrize(
    "fields",
    [{"on_failure": "ignore"}, {"on_failure": math.nan}, {"on_unscorable": "best"}, {"timeout": 0.0}, {"wait_seconds": math.inf}],
)
def test_policy_that_is_none_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Policy(**fields)


def test_signals_need_names_of_their_own() -> None:
    with pytest.raises(SignalError, match="two signals are called 'cheating'"):
        ProbeScorer([RAW, ProbeSignal("cheating", threshold=1.0)])
    with pytest.raises(SignalError, match="at least one"):
        ProbeScorer([])


# -------------------------------------------------------------------------------------------------------------------- processes


def _score_in_child(pickled: bytes, answers: Any) -> None:
    torch.set_num_threads(1)
    answers.put(pickle.loads(pickled).score(ROLLOUTS).terms)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_scorer_works_in_a_child_after_use_in_the_parent(served: RunningServer, method: str) -> None:
    one = scorer(served)
    here = one.score(ROLLOUTS).terms
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    child = context.Process(target=_score_in_child, args=(pickle.dumps(one), answers))
    child.start()
    there = answers.get(timeout=60)
    child.join()
    # a child that is spawned draws rollouts of its own, of the same seed
    np.testing.assert_array_equal(there, here)


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, ""),
        ({"PROBESCORE_JOB": "mine", "SLURM_JOB_ID": "7"}, "mine"),
        ({"SLURM_JOB_ID": "7"}, "slurm-7"),
        ({"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}, "torch-node0-29500"),
        ({"TORCHELASTIC_RUN_ID": "ab12"}, "torchelastic-ab12"),
        ({"MASTER_ADDR": "node0"}, ""),
    ],
)
def test_ranks_of_a_run_have_one_job(environment: dict[str, str], job: str) -> None:
    assert job_from_environment(environment) == job
