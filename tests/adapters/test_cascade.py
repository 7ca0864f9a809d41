"""A judge decides where the probe is unsure: real servers on both sides, of scores and of verdicts."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judge_server import PROMPT, JudgeServer, Misbehaviour, answered
from models import BOS, VOCAB_SIZE
from running_server import RunningServer

from probescore import Chat
from probescore_adapters import Cascade, CascadeDecision, Policy, ProbeScorer, ProbeSignal, Rollout, SignalError
from probescore_adapters.cascade_decisions import OVER_BUDGET, StepBudgets
from probescore_adapters.environment import signals_from
from probescore_adapters.judges import ChatJudge, JudgeError, JudgePrompt, judge
from probescore_adapters.record_options import RecordOptions
from probescore_audit.record import read_record

random = np.random.default_rng(7)
PROMPT_IDS = np.array([BOS, *random.integers(4, VOCAB_SIZE, 5)])
ROLLOUTS = [Rollout(PROMPT_IDS, random.integers(4, VOCAB_SIZE, 6)) for _ in range(12)]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(judge, "_FIRST_BACKOFF", 0.01)
    with ExitStack() as stack:
        yield lambda rule: stack.enter_context(JudgeServer(rule).running())


@pytest.fixture(scope="module")
def values(served: RunningServer) -> np.ndarray:
    return ProbeScorer(ProbeSignal("cheating", mode="monitor"), served.address).score(ROLLOUTS).values["cheating"]


def cascade(server: JudgeServer, band: Any = 1e9, template: str = PROMPT, timeout: float = 60, **options: Any) -> Cascade:
    return Cascade(ChatJudge(server.endpoint, "judge-1", JudgePrompt(template), timeout=timeout, attempts=2), band, **options)


def scorer(served: RunningServer, threshold: float, chosen: Cascade | None, mode: str = "penalty", **options: Any) -> ProbeScorer:
    signal = ProbeSignal("cheating", mode=mode, transform="flag", threshold=threshold, weight=1.0, cascade=chosen)
    return ProbeScorer(signal, served.address, **options)


def by_hash(completion: str, _: int) -> str:
    return ("yes", "no", "unsure")[sum(map(ord, completion)) % 3]


def test_the_judge_decides_in_the_band_and_nowhere_else(served, start, values):
    """Whatever the threshold and the band: inside of it the judge's word counts, outside of it the probe's flag."""
    server = start(by_hash)
    for low, at, high in ((0.2, 0.5, 0.8), (0.0, 0.3, 0.3), (0.45, 0.6, 1.0)):
        below, threshold, above = np.quantile(values, [low, at, high])
        band = (float(threshold - below), float(above - threshold))
        server.asked.clear()
        one = scorer(served, float(threshold), cascade(server, band))
        outcome = one.score(ROLLOUTS, np.ones(len(ROLLOUTS)))
        inside = (values >= below) & (values <= above)
        decisions = outcome.decisions["cheating"]
        assert [decision is not None for decision in decisions] == inside.tolist()
        assert len(server.asked) == inside.sum()
        for value, decision, flagged, term in zip(values, decisions, outcome.flagged["cheating"], outcome.terms, strict=True):
            by_probe = bool(value >= threshold)
            if decision is not None:
                assert decision.probe == by_probe
                assert decision.verdict in ("yes", "no", "unsure")
                assert decision.flagged == {"yes": True, "no": False, "unsure": by_probe}[decision.verdict]
                assert (decision.labeller, decision.labeller_version) == ("judge-1", f"{JudgePrompt(PROMPT).version} as judge-2")
            assert flagged == (by_probe if decision is None else decision.flagged)
            assert term == -float(flagged)
        np.testing.assert_array_equal(outcome.values["cheating"], values)
        assert outcome.metrics["probescore/cheating/unsure"] == pytest.approx(inside.mean())
        overruled = np.mean([decision is not None and decision.probe != decision.flagged for decision in decisions])
        assert outcome.metrics["probescore/cheating/overruled"] == pytest.approx(overruled)


async def test_an_event_loop_gets_the_same_and_is_not_held_up(served, start):
    server = start(lambda completion, count: Misbehaviour(body=answered(f"VERDICT: {by_hash(completion, count)}"), seconds=0.3))
    one = scorer(served, 0.0, cascade(server))
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.02)
            beats += 1

    beating = asyncio.create_task(beat())
    outcome = await one.score_async(ROLLOUTS)
    beating.cancel()
    assert beats >= 5
    server.rule = by_hash
    assert outcome.decisions == scorer(served, 0.0, cascade(server)).score(ROLLOUTS).decisions
    await one.close_async()


@pytest.mark.parametrize(
    ("mode", "changed"), [("penalty", "terms"), ("reward", "terms"), ("gate", "factors"), ("screen", "removed"), ("monitor", "flagged")]
)
def test_every_mode_goes_by_the_decision(served, start, values, mode, changed):
    server = start(lambda completion, count: by_hash(completion, count).replace("unsure", "no"))
    outcome = scorer(served, float(np.median(values)), cascade(server), mode).score(ROLLOUTS, np.ones(len(ROLLOUTS)))
    flags = np.array([decision.verdict == "yes" for decision in outcome.decisions["cheating"]])
    assert 0 < flags.sum() < 6
    expected = {"penalty": -1.0 * flags, "reward": 1.0 * flags, "gate": 1.0 - flags, "screen": flags, "monitor": {"cheating": flags}}[mode]
    np.testing.assert_equal(getattr(outcome, changed), expected)


def test_the_judge_sees_the_texts_of_the_rollout(served, start):
    """Ids are decoded by the server, what a trainer has as text stays, and its own texts of completions go first."""
    server = start(lambda *_: "no")
    chat = Chat.of([{"role": "user", "content": "w5 w6"}])
    rollouts = [Rollout(PROMPT_IDS, ROLLOUTS[0].completion), Rollout(chat, "w7 w8"), Rollout("w4", ROLLOUTS[1].completion)]
    one = scorer(served, 0.0, cascade(server, template="{prompt}||{completion}||"))
    one.score(rollouts)
    words = [" ".join(f"w{number}" for number in ids) for ids in (ROLLOUTS[0].completion, ROLLOUTS[1].completion)]
    seen = sorted(text.split("\n\n1")[0].split("||")[:2] for text in server.asked)
    bare = [[part.replace(" ", "") for part in each] for each in seen]
    assert ["user:w5w6", "w7w8"] in bare
    assert ["w4", words[1].replace(" ", "")] in bare
    prompts = {completion: prompt for prompt, completion in bare}
    assert all(f"w{number}" in prompts[words[0].replace(" ", "")] for number in PROMPT_IDS[1:])
    server.asked.clear()
    wide = [each.replace(" ", "   ") for each in words]
    one.score(rollouts, texts=[wide[0], None, wide[1]])
    assert {text.split("||")[1] for text in server.asked} == {wide[0], "w7 w8", wide[1]}


def test_what_was_sampled_twice_is_asked_about_once(served, start):
    server = start(lambda *_: "yes")
    outcome = scorer(served, 1e3, cascade(server, 2e3)).score([ROLLOUTS[0], ROLLOUTS[0], ROLLOUTS[1]])
    assert len(server.asked) == 2
    assert outcome.flagged["cheating"].all()


def test_the_budget_of_a_step_goes_to_those_nearest_to_the_threshold(served, start, values):
    server = start(lambda *_: "yes")
    threshold = float(values.max() + 1)
    one = scorer(served, threshold, cascade(server, budget=5))
    first, second = one.score(ROLLOUTS[:8], step=3), one.score(ROLLOUTS[8:], step=3)
    assert len(server.asked) == 5
    judged = [decision.verdict == "yes" for decision in first.decisions["cheating"]]
    assert sorted(np.flatnonzero(judged)) == sorted(np.argsort(-values[:8])[:5])
    assert {decision.reason for decision in second.decisions["cheating"]} == {OVER_BUDGET}
    assert not second.flagged["cheating"].any()
    assert second.metrics["probescore/cheating/judge_missing"] == 1.0
    one.score(ROLLOUTS, step=4)
    assert len(server.asked) == 10
    one.score(ROLLOUTS)
    one.score(ROLLOUTS)
    assert len(server.asked) == 20


def test_budgets_are_of_a_signal_and_a_step_and_old_steps_are_forgotten():
    budgets = StepBudgets()
    assert [budgets.take("a", 1, 3, 4), budgets.take("a", 1, 3, 4), budgets.take("b", 1, 3, 4), budgets.take("a", 2, 9, 4)] == [3, 1, 3, 4]
    assert budgets.take("a", 1, 1, 4) == 0
    for step in range(3, 100):
        budgets.take("a", step, 1, 4)
    assert len(budgets._taken) <= 17


@pytest.mark.parametrize("misbehaviour", [Misbehaviour(500), answered("Hm."), Misbehaviour(404), Misbehaviour(seconds=5)])
@pytest.mark.parametrize("by_probe", [False, True])
def test_a_judge_who_fails_is_never_a_silent_no(served, start, misbehaviour, by_probe, caplog):
    server = start(lambda *_: misbehaviour)
    threshold = -1e6 if by_probe else 1e6

    def scored(on_failure: str) -> Any:
        chosen = cascade(server, 1e9, on_failure=on_failure, seconds=0.4, timeout=0.3)
        return scorer(served, threshold, chosen).score(ROLLOUTS[:3])

    with pytest.raises(JudgeError, match=r"signal 'cheating': the judge gave no verdict on 3 of 3 rollouts: "):
        scored("raise")
    for on_failure, expected in (("probe", by_probe), ("flag", True)):
        begun = time.monotonic()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "probescore_adapters"):
            outcome = scored(on_failure)
        assert time.monotonic() - begun < 3
        assert outcome.flagged["cheating"].tolist() == [expected] * 3
        assert all(decision.reason and not decision.verdict for decision in outcome.decisions["cheating"])
        assert outcome.metrics["probescore/cheating/judge_missing"] == 1.0
        assert "no verdict on 3 of 3 rollouts" in caplog.text


def test_rollouts_that_the_probe_cannot_score_are_not_the_judges(served, start):
    server = start(lambda *_: "no")
    long = Rollout(PROMPT_IDS, random.integers(4, VOCAB_SIZE, 300))  # beyond the server's limit
    outcome = scorer(served, 0.0, cascade(server)).score([long, ROLLOUTS[0]])
    assert outcome.decisions["cheating"][0] is None
    assert outcome.unscorable.tolist() == [True, False]
    assert outcome.terms[0] == -1.0
    assert len(server.asked) == 1


def test_what_each_stage_said_is_in_the_record(served, start, values, tmp_path):
    server = start(by_hash)
    band = float(np.quantile(np.abs(values - np.median(values)), 0.6))
    one = scorer(served, float(np.median(values)), cascade(server, band, budget=4), record=RecordOptions(tmp_path, texts=True))
    outcome = one.score(ROLLOUTS, np.ones(len(ROLLOUTS)), step=0)
    one.close()
    record = read_record(tmp_path)
    recorded = [None if row.decisions is None else CascadeDecision(**row.decisions["cheating"]) for row in record.rollouts]
    assert recorded == list(outcome.decisions["cheating"])
    assert len({decision.reason for decision in recorded if decision}) == 2
    assert [row.total_reward for row in record.rollouts] == outcome.rewards.tolist()
    assert not record.labels  # nobody drew these at random


def test_a_scorer_with_a_judge_can_be_pickled(served, start):
    server = start(by_hash)
    one = pickle.loads(pickle.dumps(scorer(served, 0.0, cascade(server))))
    assert one.score(ROLLOUTS).decisions == scorer(served, 0.0, cascade(server)).score(ROLLOUTS).decisions


def test_metrics_have_the_same_names_whether_the_server_answers_or_not(served, start):
    chosen = cascade(start(lambda *_: "no"))
    there = scorer(served, 0.0, chosen).score(ROLLOUTS[:2])
    signal = ProbeSignal("cheating", threshold=0.0, cascade=chosen)
    gone = ProbeScorer(signal, "127.0.0.1:1", policy=Policy(on_failure=-1.0, timeout=0.3)).score(ROLLOUTS[:2])
    assert there.metrics.keys() == gone.metrics.keys()
    assert gone.decisions == {}


@pytest.mark.parametrize(
    "fields", [{"mode": "dense"}, {"transform": "excess"}, {"mode": "reward"}, {"mode": "monitor"}, {"transform": np.sign}]
)
def test_only_a_flag_can_be_decided(fields, start):
    with pytest.raises(SignalError, match="cascade: a judge says whether a rollout is flagged"):
        ProbeSignal("cheating", threshold=0.0, cascade=cascade(start(by_hash)), **fields)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"band": 0}, "band: 0"), ({"band": (1, -1)}, "band"), ({"band": float("nan")}, "band"), ({"band": "1"}, "band"),
        ({"band": (1, 2, 3)}, "band"), ({"budget": 0}, "budget: 0"), ({"budget": True}, "budget"), ({"on_failure": 0}, "on_failure: 0"),
        ({"on_failure": "ignore"}, "on_failure"), ({"seconds": 0}, "seconds"), ({"judge": "http://x"}, "judge"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(fields, complaint):
    one = ChatJudge("http://x/v1", "m", JudgePrompt(PROMPT))
    with pytest.raises(ValueError, match=rf"cascade\.{complaint}"):
        Cascade(**{"judge": one, "band": 1.0, **fields})


def test_a_cascade_comes_from_a_configuration_file_too(tmp_path: Path, served, start, values):
    server = start(by_hash)
    (tmp_path / "p.txt").write_text(PROMPT)
    given = {"endpoint": server.endpoint, "model": "judge-1", "prompt": str(tmp_path / "p.txt"), "band": [1e9, 1e9], "budget": 3}
    (signal,) = signals_from(json.loads(json.dumps({"probe": "cheating", "threshold": 0.0, "cascade": given})))
    ProbeScorer(signal, served.address).score(ROLLOUTS)
    assert len(server.asked) == 3
    for wrong, complaint in (
        ({"band": None}, "band: missing"),
        ({"api_key": "x"}, "api_key: there is no such field"),
        ({"prompt": "gone"}, "No such"),
    ):
        with pytest.raises(ValueError, match=rf"signals\[0\].*{complaint}"):
            signals_from({"probe": "cheating", "cascade": {**given, **wrong}})
