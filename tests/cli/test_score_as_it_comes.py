"""``probescore score`` hands on results as they come, and keeps what has come whatever ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from models import BOS, VOCAB_SIZE
from running_server import RunningServer, start_server

GROUPS = 600


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many that scoring takes seconds."""
    random = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("rollouts") / "rollouts.jsonl"
    lines = ({"prompt": [BOS, 5], "completion": random.integers(4, VOCAB_SIZE, 150).tolist(), "label": number} for number in range(GROUPS))
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@contextmanager
def scoring(served: RunningServer, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "probescore_server.cli", "score", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PROBESCORE_ADDRESS": served.address},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_to_the_end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What is still to be read of a process that ends; ``communicate`` would lose what was read ahead."""
    assert process.stdout is not None
    assert process.stderr is not None
    printed, said = process.stdout.read(), process.stderr.read()
    process.wait(60)
    return printed, said


def data_of(page: Path) -> dict[str, object]:
    return json.loads(page.read_text("utf-8").split('<script type="application/json" id="data">')[1].split("</script>")[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_has_come_is_kept_when_a_signal_ends_it(served: RunningServer, rollouts: Path, tmp_path: Path, number: signal.Signals) -> None:
    page = tmp_path / "page.html"
    with scoring(served, rollouts, "--json", "--html", page, "--probe", "cheating") as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert process.poll() is None  # the first result is there before the last is computed
        process.send_signal(number)
        rest, said = read_to_the_end(process)

    answers = [json.loads(line) for line in [first, *rest.splitlines()]]
    assert process.returncode == 128 + number
    assert 0 < len(answers) < GROUPS
    assert [answer["group"] for answer in answers] == sorted(answer["group"] for answer in answers)
    assert len(data_of(page)["rollouts"]) == len(answers)
    assert f"{len(answers)} of {GROUPS} rollouts came back before the end; they are kept" in said
    assert "Traceback" not in said
    assert [*tmp_path.iterdir()] == [page]


def test_what_has_come_is_kept_when_the_server_goes_away(model: Path, probe_files, rollouts: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    with (
        start_server(model, [probe_files["cheating"].parent]) as server,
        scoring(server, rollouts, "--html", page, "--show", "1") as process,
    ):
        assert process.stdout is not None
        first = process.stdout.readline()
        server.process.kill()
        _, said = read_to_the_end(process)

    assert first.startswith("group 1")
    assert process.returncode == 1
    assert 0 < len(data_of(page)["rollouts"]) < GROUPS
    assert "they are kept" in said


def test_progress_is_told_on_stderr_also_where_it_is_no_terminal(served: RunningServer, rollouts: Path) -> None:
    with scoring(served, rollouts, "--show", "0") as process:
        _, said = process.communicate(timeout=120)

    assert process.returncode == 0
    assert all(line.startswith("probescore: scored ") and line.endswith(f" of {GROUPS} rollouts") for line in said.splitlines())


def test_a_page_that_cannot_be_written_is_said_before_anything_is_scored(served: RunningServer, rollouts: Path, tmp_path: Path) -> None:
    with scoring(served, rollouts, "--json", "--html", tmp_path) as process:
        printed, said = process.communicate(timeout=60)

    assert (process.returncode, printed) == (2, "")
    assert said == f"probescore: {tmp_path}: Is a directory\n"


def test_a_label_is_carried_into_json_page_and_terminal(probescore, tmp_path: Path) -> None:
    lines = [
        {"prompt": "w5", "completions": ["w6", {"text": "w7", "label": "hack"}], "label": False},
        {"prompt": "w5", "completions": ["w6", "w7"], "label": [0.5, None]},
    ]
    stdin = "".join(json.dumps(line) + "\n" for line in lines)
    page = tmp_path / "page.html"
    answers = [json.loads(line) for line in probescore("score", "-", "--json", "--html", page, stdin=stdin).stdout.splitlines()]
    shown = probescore("score", "-", "--show", "2", stdin=stdin).stdout

    assert [answer["label"] for answer in answers] == [False, "hack", 0.5, None]
    assert [rollout["label"] for rollout in data_of(page)["rollouts"]] == ["false", "hack", "0.5", ""]
    assert "completion 1  label false" in shown
    assert "completion 2  label hack" in shown
