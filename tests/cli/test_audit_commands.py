"""``probescore audit``, ``record show``, ``labels plan`` and ``labels add`` on recorded runs, as people and scrapers use them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from probescore_audit.record import RecordWriter, RolloutRow, read_record
from probescore_server.cli.app import app

EXAMPLES = Path(__file__).parents[2] / "examples" / "audit"


def run(*arguments: str | Path, stdin: str = "") -> Result:
    return CliRunner(env={"COLUMNS": "220"}).invoke(app, list(map(str, arguments)), input=stdin)


@pytest.fixture
def evaded(tmp_path: Path) -> Path:
    """A copy that a test may add to."""
    return shutil.copytree(EXAMPLES / "evaded", tmp_path / "evaded")


def test_the_example_records_of_schema_version_1_stay_readable():
    for name, run_id, labels in (("evaded", "sorter-loss", 2214), ("changed", "sorter-penalty", 2275)):
        record = read_record(EXAMPLES / name)
        assert record.header.schema_version == 1
        assert record.header.run_id == run_id
        assert (len(record.rollouts), len(record.labels), len(record.references)) == (20480, labels, 2254)
        assert (record.torn_lines, record.void_rows) == (0, 0)
        assert {row.step for row in record.anchors} == {0, 20, 40, 60, 79}


def test_each_example_ends_with_the_right_verdict():
    said = run("audit", EXAMPLES / "evaded").stdout
    assert "cheating@1 on frozen (monitor, mean): behaviour rose" in said
    assert "cheating@1 on policy (monitor, mean): evaded" in said
    assert "What to do: This run should have been stopped: the monitors raised an alarm at step 12." in said
    assert "obfuscated activations" in said
    said = run("audit", EXAMPLES / "changed").stdout
    assert said.count(": behaviour changed\n") == 2
    assert "alarm at step" not in said
    assert "Cannot know" in said
    assert "Assumes" in said


def test_the_how_to_shows_what_is_printed(tmp_path):
    page = (EXAMPLES.parents[1] / "docs/how-to/audit-a-run.md").read_text()
    shown = re.findall(r"```bash\nprobescore (audit examples/audit/(\w+).*?)\n```\n\n```text\n(.*?)```", page, re.DOTALL)
    assert [name for _, name, _ in shown] == ["changed", "evaded"]
    for _, name, text in shown:
        printed = run("audit", EXAMPLES / name).stdout
        for line in filter(None, text.splitlines()):
            assert line.removesuffix("…").rstrip() in printed


def test_json_and_page(tmp_path):
    done = run("audit", EXAMPLES / "evaded", "--reading", "policy", "--json", "--report", tmp_path / "audit.html")
    assert done.exit_code == 0
    (policy,) = json.loads(done.stdout)["readings"]
    assert policy["verdict"] == "evaded"
    assert policy["alarms"][0]["step"] == 12
    assert "evaded" in (tmp_path / "audit.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["audit", "nothing-here"], "nothing-here: no record"),
        (["audit", EXAMPLES / "evaded", "--probe", "x@1"], "probe: 'x@1'; the record has cheating@1"),
        (["audit", EXAMPLES / "evaded", "--metrics-port", "0"], "--metrics-port: there is nothing to scrape"),
        (["audit", EXAMPLES / "evaded", "--report", "/nothing/here.html"], "No such file"),
        (["record", "show", EXAMPLES / "evaded", "--step", "900"], "--step: 900; the record has steps 0 to 79"),
        (["labels", "plan", EXAMPLES / "evaded", "--more", "9", "--per-step", "9"], "--more: the steps, the probe"),
        (["labels", "plan", EXAMPLES / "evaded", "--reading", "policy"], "shared out by the scores of cheating@1, frozen"),
        (["labels", "add", EXAMPLES / "evaded", "/nothing/here"], "/nothing/here: No such file"),
        (["labels", "add", EXAMPLES / "evaded", "-", "--second", "--replace"], "give one of them"),
    ],
)
def test_wrong_input_is_one_line(arguments, complaint):
    done = run(*arguments)
    assert done.exit_code == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_record_is_shown(evaded):
    said = run("record", "show", evaded, "--step", "40", "--rollouts", "2").stdout
    for fact in (
        "steps 0 to 79, 80 planned",
        "20,480 of 2,560 prompts",
        "2,214 (1,450 yes, 764 no), by checker",
        "2,254 rollouts, 384 with",
    ):
        assert fact in said
    assert "step 40, rollout 0.0 of prompt 40.0" in said
    rows = [json.loads(line) for line in run("record", "show", evaded, "--json", "--step", "79").stdout.splitlines()]
    assert len(rows) == 256
    assert sum(bool(row["labels"]) for row in rows) > 16


def test_what_a_record_says_cannot_command_the_terminal(evaded):
    record = read_record(evaded)
    with RecordWriter(evaded, record.header.anew(), keep_texts=True) as writer:
        writer.append([RolloutRow(step=80, rollout="[bold]x\x1b[31m", prompt="p", scores={}, completion_text="\x1b]0;owned\x07 [red]")])
    for arguments in (["--step", "80"], ["--step", "80", "--json"]):
        said = run("record", "show", evaded, *arguments).stdout
        assert "\x1b" not in said
        assert "[bold]x" in said


def test_a_plan_is_filled_in_and_added(evaded, tmp_path):
    record = read_record(evaded)
    with RecordWriter(evaded, record.header.anew()) as writer:  # training goes on
        writer.append(
            RolloutRow(step=80, rollout=row.rollout, prompt=row.prompt, scores=row.scores, text_sha256=f"sha256:{row.rollout}")
            for row in record.rollouts
            if row.step == 79
        )
    plan = tmp_path / "plan.jsonl"
    assert "rollouts to label, of 1 steps" in run("labels", "plan", evaded, "--per-step", "16", "-o", plan).stderr
    lines = [json.loads(line) for line in plan.read_text().splitlines()]
    assert {line["step"] for line in lines} == {80}
    assert all(line["label"] is None and "scores" not in line and 0 < line["inclusion"] <= 1 for line in lines)
    filled = "\n".join(json.dumps({**line, "label": "no" if index else None}) for index, line in enumerate(lines))
    done = run("labels", "add", evaded, "-", "--labeller", "ann", stdin=filled)
    assert f"added labels of {len(lines) - 1} rollouts; 1 lines have none" in done.stdout
    added = read_record(evaded).labels[-len(lines) + 1 :]
    assert {(label.labeller, label.source, label.label, label.step) for label in added} == {("ann", "person", "no", 80)}
    again = run("labels", "add", evaded, "-", stdin=filled)
    assert again.exit_code == 2
    assert "has a label; say whether" in again.stderr
    assert "nothing to label: every step has labels" in run("labels", "plan", evaded).stderr


def test_of_a_file_with_one_bad_line_nothing_is_added(evaded):
    good = '{"step": 79, "rollout": "0.0", "label": "yes"}'
    for bad in ('{"step": 79, "rollout": "none", "label": "no"}', "{", "[]"):
        done = run("labels", "add", evaded, "-", "--replace", stdin=f"{good}\n{bad}\n")
        assert done.exit_code == 2
    assert len(list(evaded.iterdir())) == 1


def test_whatever_ends_a_line_elsewhere_may_be_in_a_note(evaded):
    line = json.dumps({"step": 79, "rollout": "0.0", "label": "yes", "note": "a\u2028b\x85c"}, ensure_ascii=False)
    done = run("labels", "add", evaded, "-", "--replace", stdin=f"{line}\n")
    assert done.exit_code == 0, done.stderr
    assert read_record(evaded).labels[-1].note == "a\u2028b\x85c"


def test_labels_of_no_plan_are_kept_and_said_not_to_count(evaded):
    record = read_record(evaded)
    known = {(label.step, label.rollout) for label in record.labels}
    unlabelled = next(row for row in record.rollouts if row.step == 79 and (row.step, row.rollout) not in known)
    done = run("labels", "add", evaded, "-", stdin=json.dumps({"step": 79, "rollout": unlabelled.rollout, "label": True}))
    assert "1 labels have no inclusion" in done.stderr


def test_further_labels_are_planned(evaded):
    lines = [json.loads(line) for line in run("labels", "plan", evaded, "--more", "64").stdout.splitlines()]
    assert 50 <= len(lines) <= 66
    assert all(line["population"] >= 1 and line["step"] > 60 for line in lines)


def test_following_shows_what_comes_and_metrics_tell_prometheus(evaded, tmp_path):
    """A trainer writes while a process audits, and a scraper looks."""
    record = read_record(evaded)
    (evaded / "rank00000.jsonl.gz").rename(tmp_path / "whole.gz")
    command = ["audit", evaded, "--follow", "--interval", "0.2", "--metrics-port", "0", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "probescore_server.cli", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        address = re.search(r"metrics are at (http://\S+)", process.stderr.readline())
        assert address is not None
        assert "not yet: evaded: no record" in process.stderr.readline()
        assert "probescore_audit_failures_total 1.0" in scraped(address[1])
        (tmp_path / "whole.gz").rename(evaded / "rank00000.jsonl.gz")
        assert json.loads(process.stdout.readline())["last_step"] == 79
        found = scraped(address[1])
        which = 'probe="cheating@1",reading="policy",run="sorter-loss"'
        assert sample(found, "probescore_audit_verdict", f'{which},verdict="evaded"') == 1.0
        assert sample(found, "probescore_audit_verdict", f'{which},verdict="no change"') == 0.0
        assert sample(found, "probescore_audit_alarm", f'monitor="recall",{which}') == 1.0
        assert sample(found, "probescore_audit_recall", f'bound="high",{which}') < 0.1
        assert sample(found, "probescore_audit_anchor_move", which) > 1
        assert sample(found, "probescore_audit_anchor_move", which.replace("policy", "frozen")) == 0.0
        assert abs(sample(found, "probescore_audit_audited_seconds", 'run="sorter-loss"') - time.time()) < 300
        with RecordWriter(evaded, record.header.anew()) as writer:
            writer.append([RolloutRow(step=80, rollout="0", prompt="p", scores=record.rollouts[0].scores)])
        assert json.loads(process.stdout.readline())["last_step"] == 80
        if promtool := shutil.which("promtool"):
            checked = subprocess.run([promtool, "check", "metrics"], input=scraped(address[1]), capture_output=True, text=True, check=False)
            assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()


def scraped(address: str) -> str:
    with urllib.request.urlopen(address, timeout=30) as answer:  # noqa: S310
        return answer.read().decode()


def sample(text: str, name: str, labels: str) -> float:
    wanted = sorted(re.findall(r'\w+="[^"]*"', labels))
    for line in text.splitlines():
        found = re.fullmatch(rf"{name}\{{(.*)\}} (\S+)", line)
        if found and sorted(re.findall(r'\w+="[^"]*"', found[1])) == wanted:
            return float(found[2])
    raise AssertionError(f"no {name} with {labels}")
