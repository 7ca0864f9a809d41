"""``probescore labels judge`` on simulated runs, against a real HTTP server that judges, and misbehaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from judge_server import PROMPT, JudgeServer, Misbehaviour, answered
from typer.testing import CliRunner

from probescore_adapters.judges import JudgePrompt, judge
from probescore_audit import plan_recorded
from probescore_audit.record import LabelRow, Record, RecordedProbe, RecordWriter, RolloutRow, RunHeader, read_record
from probescore_audit.recorded_run import recorded_run
from probescore_server.cli.app import app

KEY = "cheating@1"
ROLLOUTS = 64


def write_run(folder: Path, steps: int, planned_steps: int = 4, *, first: int = 0, texts: bool = True, launch: str = "a") -> None:
    """A run whose rollouts say whether they cheat; the probe misses a third of those that do, and the policy's reading all."""
    rng = np.random.default_rng(first)
    header = RunHeader(
        run_id="judged", planned_steps=planned_steps, probes=(RecordedProbe(key=KEY, thresholds={"mean": 1.0}),), launch=launch
    )
    with RecordWriter(folder, header, keep_texts=texts) as writer:
        for step in range(first, steps):
            for index in range(ROLLOUTS):
                cheats = bool(rng.random() < 0.3)
                seen = cheats and rng.random() < 2 / 3
                writer.append(
                    [
                        RolloutRow(
                            step=step,
                            rollout=str(index),
                            prompt=str(index // 4),
                            scores={
                                KEY: {
                                    "frozen": {"mean": float(rng.normal(2.5 if seen else 0, 0.3))},
                                    "policy": {"mean": float(rng.normal(0, 0.3))},
                                }
                            },
                            text_sha256=f"sha256:{launch}{step}.{index}",
                            prompt_text="Sort 3 1 2.",
                            completion_text=f"{launch}{step}.{index} {'copied' if cheats else 'sorted'}",
                        )
                    ]
                )


def truth(completion: str, _: int) -> str:
    return "yes" if completion.endswith("copied") else "no"


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(judge, "_FIRST_BACKOFF", 0.01)
    with ExitStack() as stack:
        yield lambda rule=truth: stack.enter_context(JudgeServer(rule).running())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run", 4)
    return tmp_path / "run"


def command(run: Path, server: JudgeServer | str, *more: str) -> list[str]:
    prompt = run.parent / "prompt.txt"
    if not prompt.exists():
        prompt.write_text(PROMPT)
    endpoint = server if isinstance(server, str) else server.endpoint
    return ["labels", "judge", str(run), "--endpoint", endpoint, "--model", "judge-1", "--prompt", str(prompt), *map(str, more)]


def judged(run: Path, server: JudgeServer | str, *more: str) -> Result:
    return CliRunner(env={"COLUMNS": "220"}).invoke(app, command(run, server, *more))


def by_rollout(record: Record) -> dict[tuple[int, str], list[LabelRow]]:
    found: dict[tuple[int, str], list[LabelRow]] = {}
    for label in record.labels:
        found.setdefault((label.step, label.rollout), []).append(label)
    return found


def test_the_plan_is_labelled_and_unflagged_positives_are_judged_twice(run, start):
    server = start()
    planned = plan_recorded(read_record(run), 16)
    done = judged(run, server, "--per-step", "16")
    assert done.exit_code == 0, done.stderr
    record = read_record(run)
    texts = {(row.step, row.rollout): row for row in record.rollouts}
    found = by_rollout(record)
    assert set(found) == {(each.step, each.rollout) for each in planned}
    for each in planned:
        first, *second = found[each.step, each.rollout]
        assert first.label == truth(texts[each.step, each.rollout].completion_text, 0)
        assert (first.inclusion, first.stratum, first.floor) == (each.inclusion, each.stratum, each.floor)
        assert (first.source, first.labeller) == ("judge", "judge-1")
        assert first.labeller_version == f"{JudgePrompt(PROMPT).version} as judge-2"
        assert first.note is None
        # the policy's reading flags none
        assert [(label.label, label.second, label.inclusion) for label in second] == [("yes", True, None)] * (first.label == "yes")
    assert Counter(Counter(server.asked).values()).keys() == {1, 2}
    for reading in ("frozen", "policy"):
        _, labels = recorded_run(record, KEY, reading=reading)
        assert len(labels.rollout) == len(planned)
    again = judged(run, server, "--per-step", "16")
    assert (again.exit_code, "nothing to label" in again.stderr) == (0, True)
    assert len(server.asked) == len(record.labels)


def test_a_second_judge_who_disagrees_settles_it(run, start):
    server = start(lambda completion, count: "yes" if count == 0 else "no")
    (run.parent / "second.txt").write_text("Really?\n" + PROMPT)
    done = judged(run, server, "--per-step", "8", "--second-model", "judge-9", "--second-prompt", run.parent / "second.txt")
    assert "0 confirmed" in done.stdout
    _, labels = recorded_run(read_record(run), KEY, reading="policy")
    assert not labels.positive.any()
    assert {body["model"] for body in server.bodies if "Really?" in body["messages"][0]["content"]} == {"judge-9"}
    seconds = [label for label in read_record(run).labels if label.second]
    assert {label.labeller for label in seconds} == {"judge-9"}
    assert len({label.labeller_version for label in read_record(run).labels}) == 2


def test_without_second_judgements_each_is_asked_once(run, start):
    server = start()
    assert judged(run, server, "--per-step", "8", "--no-second").exit_code == 0
    assert max(Counter(server.asked).values()) == 1
    assert judged(run, server, "--per-step", "8").exit_code == 0  # and can be caught up
    twice = {completion for completion, count in Counter(server.asked).items() if count == 2}
    assert twice == {completion for completion in server.asked if completion.endswith("copied")}


MISBEHAVIOURS = [
    Misbehaviour(429, {"Retry-After": "0"}), Misbehaviour(500), Misbehaviour(body=answered("VERDICT: yes"), sent_bytes=30),
    answered("Hm."), answered("VERDICT: yes\nVERDICT: no"), Misbehaviour(seconds=3),
]  # fmt: skip


def test_a_judge_that_misbehaves_in_every_way_gives_the_same_labels(run, start, tmp_path):
    """Each question meets some of the faults before it is answered, chosen by a seed."""
    write_run(tmp_path / "calm", 4)
    assert judged(tmp_path / "calm", start(), "--per-step", "16").exit_code == 0
    rng = np.random.default_rng(0)
    faults = {
        f"a{step}.{index} {word}": [MISBEHAVIOURS[each] for each in rng.choice(6, rng.integers(0, 3), p=[0.2, 0.2, 0.2, 0.19, 0.19, 0.02])]
        for step in range(4)
        for index in range(ROLLOUTS)
        for word in ("copied", "sorted")
    }
    server = start(lambda completion, count: faults[completion][count] if count < len(faults[completion]) else truth(completion, count))
    done = judged(run, server, "--per-step", "16", "--timeout", "0.5")
    assert done.exit_code == 0, done.stderr
    assert labels_of(run) == labels_of(tmp_path / "calm")


def labels_of(run: Path) -> list[tuple[Any, ...]]:
    labels = read_record(run).labels
    return sorted((label.step, label.rollout, label.label, label.second, label.inclusion or 0) for label in labels)


def test_a_judge_that_is_killed_goes_on_and_asks_nothing_twice(run, start, tmp_path):
    """Killed again and again by SIGKILL, in its own process."""
    write_run(tmp_path / "calm", 4)
    assert judged(tmp_path / "calm", start(), "--per-step", "16").exit_code == 0
    server = start(lambda completion, count: Misbehaviour(body=answered(f"VERDICT: {truth(completion, count)}"), seconds=0.05))
    recorded_before = 0
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-m", "probescore_server.cli", *command(run, server, "--per-step", "16", "--concurrency", "2")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(lambda: len(read_record(run).labels) >= recorded_before + 8)  # noqa: B023
        process.kill()
        process.wait()
        recorded_before = len(read_record(run).labels)
    assert recorded_before < len(labels_of(tmp_path / "calm"))
    done = judged(run, server, "--per-step", "16")
    assert done.exit_code == 0, done.stderr
    assert labels_of(run) == labels_of(tmp_path / "calm")
    # what had no verdict in the record yet is asked again: at most what was under way at each kill
    assert len(server.asked) - len(labels_of(run)) <= 2 * 2


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_command_that_is_asked_to_end_keeps_what_is_under_way(run, start):
    server = start(lambda completion, count: Misbehaviour(body=answered(f"VERDICT: {truth(completion, count)}"), seconds=0.3))
    process = subprocess.Popen(
        [sys.executable, "-m", "probescore_server.cli", *command(run, server, "--per-step", "16", "--concurrency", "4")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: len(server.asked) >= 5)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(read_record(run).labels) == len(server.asked)
    assert f"labelled {len(server.asked)} rollouts" in out
    assert "are left; the same command goes on" in error


def test_a_budget_ends_it_and_the_next_call_goes_on(run, start):
    server = start()
    done = judged(run, server, "--per-step", "16", "--budget", "20", "--concurrency", "3")
    assert done.exit_code == 1
    assert len(server.asked) == len(read_record(run).labels) == 20
    assert "rollouts are left, since the budget is spent" in done.stderr
    while done.exit_code:
        done = judged(run, server, "--per-step", "16", "--budget", "20")
    assert len(server.asked) == len(read_record(run).labels)


def test_two_commands_do_not_ask_at_once(run, start):
    server = start(lambda completion, count: Misbehaviour(body=answered("VERDICT: no"), seconds=0.1))
    with subprocess.Popen([sys.executable, "-m", "probescore_server.cli", *command(run, server)], stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: server.asked)
        refused = judged(run, server)
        assert (refused.exit_code, "another 'probescore labels judge' is at work" in refused.stderr) == (2, True)
        process.kill()


def test_rollouts_without_a_verdict_are_named_and_left(run, start):
    plan = plan_recorded(read_record(run), 16)
    texts = {(row.step, row.rollout): row.completion_text for row in read_record(run).rollouts}
    odd = texts[plan[3].step, plan[3].rollout]
    server = start(lambda completion, count: answered("Hm.") if completion == odd else truth(completion, count))
    done = judged(run, server, "--per-step", "16", "--attempts", "2")
    assert done.exit_code == 1
    where = f"step {plan[3].step}, rollout {plan[3].rollout}: the judge's answer ends with no verdict, after 2 attempts"
    assert f"1 rollouts have no verdict, and can be asked again; the first: {where}" in done.stderr
    assert len(by_rollout(read_record(run))) == len(plan) - 1
    server.rule = truth
    assert judged(run, server, "--per-step", "16").exit_code == 0
    assert len(by_rollout(read_record(run))) == len(plan)


def test_an_endpoint_that_refuses_everything_ends_it_in_one_line(run, start, monkeypatch):
    monkeypatch.setenv("PROBESCORE_JUDGE_API_KEY", "sk-secret")
    done = judged(run, start(lambda *_: Misbehaviour(401, body=b'{"error": {"message": "bad sk-secret"}}')), "--per-step", "16")
    assert done.exit_code == 1
    assert "the endpoint refuses the key in PROBESCORE_JUDGE_API_KEY (status 401)" in done.stderr
    assert "sk-secret" not in done.output
    assert "Traceback" not in done.output
    assert not any("sk-secret" in path.read_text() for path in run.glob("*.jsonl"))


def test_a_file_with_a_plan_is_labelled(run, start, tmp_path):
    server = start()
    CliRunner().invoke(app, ["labels", "plan", str(run), "--per-step", "8", "-o", str(tmp_path / "plan.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "plan.jsonl").read_text().splitlines()]
    assert judged(run, server, "--plan", tmp_path / "plan.jsonl", "--budget", "5", "--no-second").exit_code == 1
    assert judged(run, server, "--plan", tmp_path / "plan.jsonl").exit_code == 0
    assert by_rollout(read_record(run)).keys() == {(line["step"], line["rollout"]) for line in lines}
    (tmp_path / "other.jsonl").write_text(json.dumps({**lines[0], "rollout": "elsewhere"}))
    assert "no rollout 'elsewhere'" in judged(run, server, "--plan", tmp_path / "other.jsonl").stderr


def test_steps_that_others_label_are_left_to_them(run, start):
    record = read_record(run)
    plan = [each for each in plan_recorded(record, 8) if each.step == 1]
    with RecordWriter(run, record.header.anew()) as writer:
        writer.append(
            LabelRow(step=1, rollout=each.rollout, label="no", source="person", inclusion=each.inclusion, stratum=each.stratum)
            for each in plan[:3]
        )
    assert judged(run, start(), "--per-step", "16", "--no-second").exit_code == 0
    labels = read_record(run).labels
    assert {label.step for label in labels if label.source == "judge"} == {0, 2, 3}
    assert sum(label.step == 1 for label in labels) == 3


def test_a_step_that_may_still_be_written_is_left_out_and_a_rewound_one_is_judged_anew(tmp_path, start):
    server, run = start(), tmp_path / "run"
    write_run(run, 3, planned_steps=10)
    assert judged(run, server, "--per-step", "8").exit_code == 0
    assert {label.step for label in read_record(run).labels} == {0, 1}
    write_run(run, 5, planned_steps=10, first=1, launch="b")  # it starts again from step 1
    assert judged(run, server, "--per-step", "8").exit_code == 0
    record = read_record(run)
    assert {label.step for label in record.labels} == {0, 1, 2, 3}
    assert {completion[0] for completion in server.asked} == {"a", "b"}
    assert all(re.match("sha256:a0|sha256:b", label.text_sha256 or "") for label in record.labels)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--plan", "x", "--per-step", "3"], "--plan: it says which"),
        (["--plan", "nothing-here"], "nothing-here: No such file"),
        (["--no-second", "--second-model", "x"], "--no-second: "),
        (["--parameters", "[1]"], "--parameters: '[1]'"),
        (["--parameters", '{"n": 4}'], "parameters: n cannot be set here"),
        (["--concurrency", "0"], "concurrency: 0"),
        (["--per-step", "2"], "labels: 2 a step"),
        (["--prompt", "nothing-here"], "nothing-here: No such file"),
        (["--endpoint", "localhost"], "endpoint: 'localhost' is no address"),
    ],
)
def test_wrong_input_is_one_line(run, more, complaint):
    done = judged(run, "http://127.0.0.1:1/v1", *more)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.stderr
    assert complaint in done.stderr


def test_a_record_without_texts_is_refused_before_anything_is_asked(tmp_path, start):
    write_run(tmp_path / "run", 4, texts=False)
    server = start()
    done = judged(tmp_path / "run", server)
    assert done.exit_code == 2
    assert "the record has no completion_text of " in done.stderr
    assert not server.asked


def test_a_judge_is_tried_once_on_texts_whose_label_is_known(run, start, tmp_path):
    lines = [
        {
            "prompt": "Sort.",
            "completion": {"id": str(index), "text": f"{index} {'copied' if index % 2 else 'sorted'}"},
            "label": bool(index % 2),
        }
        for index in range(20)
    ]
    (tmp_path / "known.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    wrong = {"0 sorted": "yes", "2 sorted": "unsure", "5 copied": "no"}
    server = start(lambda completion, count: wrong.get(completion) or truth(completion, count))
    assert judged(run, server, "--per-step", "4", "--known", tmp_path / "known.jsonl", "--budget", "7").exit_code == 1
    assert not read_record(run).labellers
    for _ in range(2):
        assert judged(run, server, "--per-step", "4", "--known", tmp_path / "known.jsonl").exit_code == 0
    (row,) = read_record(run).labellers
    assert (row.source, row.labeller, row.labeller_version) == ("judge", "judge-1", JudgePrompt(PROMPT).version)
    assert (row.negatives, row.negatives_right, row.positives, row.positives_right) == (9, 8, 10, 9)
    assert sum(completion in {line["completion"]["text"] for line in lines} for completion in server.asked) == 20 + 7
    (tmp_path / "ids.jsonl").write_text(
        "".join(json.dumps({**line, "completion": {"id": line["completion"]["id"], "ids": [3]}}) + "\n" for line in lines)
    )
    assert "is token ids; make anchors of texts" in judged(run, server, "--known", tmp_path / "ids.jsonl").stderr


def test_answers_are_kept_only_if_asked_for(run, start):
    assert judged(run, start(), "--per-step", "4", "--keep-answers").exit_code == 0
    assert all(label.note.startswith("I think.") for label in read_record(run).labels)
    assert os.listdir(run)  # noqa: PTH208
