"""What ``ProbeScorer(record=…)`` writes while it scores on a real server, and what the record's reader and the audit make of it."""

from __future__ import annotations

import logging
import math
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import BOS, VOCAB_SIZE
from running_server import RunningServer

from probescore import ProbeClient
from probescore_adapters import GuardRails, Policy, ProbeScorer, ProbeSignal, RecordOptions, Rollout, SignalError, score_rollouts
from probescore_audit import Verdict, audit_record
from probescore_audit.record import read_record
from probescore_audit.recorded_run import planned_by, read_run, recorded_run

PENALTY = ProbeSignal("cheating", weight=2.0)
random = np.random.default_rng(2)


def rollouts(prompts: int = 3, each: int = 4) -> list[Rollout]:
    asked = [np.array([BOS, *random.integers(4, VOCAB_SIZE, 5)]) for _ in range(prompts)]
    return [Rollout(prompt, random.integers(4, VOCAB_SIZE, 4 + number)) for prompt in asked for number in range(each)]


def scorer(served: RunningServer, record: Any, *signals: ProbeSignal, **options: Any) -> ProbeScorer:
    return ProbeScorer(signals or (PENALTY,), served.address, record=record, rails=GuardRails(clip=1e6), **options)


def test_what_was_scored_and_rewarded_is_in_the_record(served: RunningServer, tmp_path: Path) -> None:
    one = scorer(served, tmp_path / "sort-7")
    given = [rollouts() for _ in range(3)]
    outcomes = [one.score(batch, np.arange(12.0), step=step) for step, batch in enumerate(given)]
    record = read_record(tmp_path / "sort-7")
    (probe,) = ProbeClient(served.address).list_probes()[:1]
    info = ProbeClient(served.address).get_server_info()
    assert record.header.run_id == "sort-7"
    assert (record.header.model_fingerprint, record.header.tokenizer_fingerprint) == (info.model.fingerprint, info.tokenizer_fingerprint)
    (described,) = record.header.probes
    assert (described.key, described.graph_sha256, described.manifest_sha256) == (probe.key, probe.graph_sha256, probe.manifest_sha256)
    assert (described.role, dict(described.thresholds)) == ("reward", {"mean": probe.calibrations[0].threshold})
    table = record.table()
    assert table.step.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    values = np.concatenate([each.values["cheating"] for each in outcomes])
    np.testing.assert_array_equal(table.scores["cheating@1", "frozen", "mean"], values)
    np.testing.assert_array_equal(table.numbers["total_reward"], np.concatenate([each.rewards for each in outcomes]))
    np.testing.assert_array_equal(table.numbers["task_reward"], np.tile(np.arange(12.0), 3))
    assert table.numbers["tokens"].tolist() == [len(rollout.completion) for batch in given for rollout in batch]
    assert (table.scores["cheating@1", "frozen", "max"] > table.scores["cheating@1", "frozen", "mean"]).all()
    prompts = [row.prompt for row in record.rollouts]
    assert len(set(prompts)) == 9
    assert prompts[0] == prompts[3] != prompts[4]
    assert len({row.text_sha256 for row in record.rollouts}) == 36


def test_without_a_record_the_same_is_rewarded_and_no_more_is_asked(served: RunningServer, tmp_path: Path) -> None:
    batch = rollouts()
    plain, recorded = (ProbeScorer(PENALTY, served.address, record=record) for record in (None, tmp_path))
    np.testing.assert_array_equal(plain.score(batch).rewards, recorded.score(batch, step=0).rewards)


@pytest.mark.parametrize("kept", [(), ("texts",), ("ids",), ("token_scores",), ("texts", "ids", "token_scores")])
def test_texts_ids_and_token_scores_are_kept_on_request(served: RunningServer, tmp_path: Path, kept: tuple[str, ...]) -> None:
    one = scorer(served, RecordOptions(tmp_path, **dict.fromkeys(kept, True)))  # type: ignore[arg-type]
    batch = rollouts(1, 2)
    one.score(batch, step=0)
    for row, rollout in zip(read_record(tmp_path).rollouts, batch, strict=True):
        assert (row.completion_text is not None, row.prompt_text is not None) == ("texts" in kept,) * 2
        assert row.completion_ids == (list(rollout.completion) if "ids" in kept else None)
        assert row.prompt_ids == (list(rollout.prompt) if "ids" in kept else None)
        if "texts" in kept:
            assert len(row.completion_pieces) == len(rollout.completion)
        if "token_scores" in kept:
            tokens = row.token_scores["cheating@1"]["frozen"]
            assert np.mean(tokens) == pytest.approx(row.scores["cheating@1"]["frozen"]["mean"], abs=1e-3)
        else:
            assert row.token_scores is None


def test_own_loop_names_rollouts_and_gives_what_it_knows(served: RunningServer, tmp_path: Path) -> None:
    one, batch = scorer(served, None), rollouts(2, 2)
    given = ([each.prompt for each in batch], [each.completion for each in batch])
    common = {"task_rewards": [0.0, 1.0, 2.0, 3.0], "groups": ["a", "a", "b", "b"], "record": tmp_path}
    score_rollouts(one, *given, **common, step=4, names=["w", "x", "y", "z"], logprobs=[-1.0, -2.0, -3.0, -4.0])  # type: ignore[arg-type]
    score_rollouts(one, *given, **{**common, "record": False}, step=4)  # type: ignore[arg-type]
    rows = read_record(tmp_path).rollouts
    known = [(row.rollout, row.group, row.policy_logprob) for row in rows]
    assert known == [("w", "a", -1), ("x", "a", -2), ("y", "b", -3), ("z", "b", -4)]
    score_rollouts(one, *given, **{**common, "record": str(tmp_path)}, step=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"record: .*writes into"):
        score_rollouts(one, *given, record=tmp_path / "other", step=5)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------------------- attempts


def recorded(folder: Path) -> dict[int, int]:
    """Number of rollouts that count, by step."""
    steps, counts = np.unique(read_record(folder).table().step, return_counts=True)
    return dict(zip(steps.tolist(), counts.tolist(), strict=True))


@pytest.mark.parametrize("how", ["the same scorer", "a scorer made anew"])
@pytest.mark.parametrize("back", [2, 3, 6])
def test_training_that_goes_back_counts_no_rollout_twice(served: RunningServer, tmp_path: Path, how: str, back: int) -> None:
    one, batch = scorer(served, tmp_path), rollouts(2, 2)
    for step in range(6):
        one.score(batch, step=step)
    if how == "a scorer made anew":
        one = scorer(served, tmp_path)
    one.score(batch, step=6 - back)
    assert recorded(tmp_path) == dict.fromkeys(range(7 - back), 4)
    assert read_record(tmp_path).void_rows == 4 * back


def test_rollouts_that_come_late_are_no_return_to_an_earlier_step(served: RunningServer, tmp_path: Path) -> None:
    one, batch = scorer(served, RecordOptions(tmp_path, late_steps=2)), rollouts(1, 2)
    for step in (0, 1, 0, 2, 1, 3, 1):
        one.score(batch, step=step)
    assert recorded(tmp_path) == {0: 4, 1: 6, 2: 2, 3: 2}


def test_processes_that_share_a_scorer_write_beside_each_other(served: RunningServer, tmp_path: Path) -> None:
    """Forked and pickled scorers are of one launch, whichever of them began later."""
    one, batch = scorer(served, tmp_path), rollouts(1, 3)
    other = pickle.loads(pickle.dumps(one))
    one.score(batch, step=0)
    one.score(batch, step=1)
    for step in range(2):
        other.score(batch, step=step)
    child = os.fork()
    if not child:
        try:
            one.score(batch, step=0)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    one.score(batch, step=2)
    assert recorded(tmp_path) == {0: 9, 1: 6, 2: 3}
    assert len(list(tmp_path.iterdir())) == 3


def test_steps_are_counted_where_the_trainer_does_not_say_them(served: RunningServer, tmp_path: Path) -> None:
    one = scorer(served, RecordOptions(tmp_path, rollouts_per_step=4))
    for _ in range(6):
        one.score(rollouts(1, 2))
    assert recorded(tmp_path) == {0: 4, 1: 4, 2: 4}
    with pytest.raises(ValueError, match="step: the record needs the training step"):
        scorer(served, tmp_path).score(rollouts(1, 1))


# ------------------------------------------------------------------------------------------------------------------- what goes wrong


def full(one: ProbeScorer) -> None:
    device = os.open("/dev/full", os.O_WRONLY)
    os.dup2(device, one.recorder._writer._file)  # type: ignore[union-attr]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("policy", ["log", "raise"])
def test_a_full_disk_is_an_error_in_the_log_or_ends_the_run(served: RunningServer, tmp_path: Path, policy: Any, caplog: Any) -> None:
    one, batch = scorer(served, RecordOptions(tmp_path, on_error=policy)), rollouts(1, 2)
    one.score(batch, step=0)
    full(one)
    if policy == "raise":
        with pytest.raises(OSError, match="No space left"):
            one.score(batch, step=1)
    else:
        assert np.isfinite(one.score(batch, step=1).rewards).all()
        assert "the record lost 2 rows: No space left" in caplog.text


def test_a_folder_that_goes_away_does_not_end_training(served: RunningServer, tmp_path: Path, caplog: Any) -> None:
    one, batch = scorer(served, tmp_path / "run"), rollouts(1, 2)
    (tmp_path / "run").rmdir()
    (tmp_path / "run").write_text("a file")
    assert np.isfinite(one.score(batch, step=0).rewards).all()
    assert "2 rollouts are not in the record" in caplog.text
    (tmp_path / "run").unlink()
    one.score(batch, step=1)
    assert recorded(tmp_path / "run") == {1: 2}


def test_a_folder_that_cannot_be_made_is_found_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ProbeScorer(PENALTY, record=tmp_path / "file" / "run")


def test_the_record_of_another_run_is_not_written_into(served: RunningServer, tmp_path: Path) -> None:
    scorer(served, tmp_path, run_id="sort-7").score(rollouts(1, 1), step=0)
    with pytest.raises(ValueError, match="has the record of the run 'sort-7', and this run is 'sort-8'"):
        scorer(served, tmp_path, run_id="sort-8")
    assert recorded(tmp_path) == {0: 1}


def test_rollouts_without_scores_are_in_the_record_as_such(served: RunningServer, tmp_path: Path) -> None:
    down = ProbeScorer(PENALTY, "localhost:1", record=tmp_path, policy=Policy(on_failure=0.0, timeout=0.5))
    down.score(rollouts(1, 2), np.ones(2), step=0)
    up = scorer(served, tmp_path)
    up.score([*rollouts(1, 1), Rollout([BOS], [])], step=1)
    assert [len(row.scores) for row in read_record(tmp_path).rollouts] == [0, 0, 1, 0]


def test_redacted_texts_are_all_that_is_kept(served: RunningServer, tmp_path: Path) -> None:
    batch = rollouts(1, 2)
    scorer(served, RecordOptions(tmp_path / "a", texts=True, redact=lambda text: "w" * len(text))).score(batch, step=0)
    row = read_record(tmp_path / "a").rollouts[0]
    assert {*row.completion_text, *row.prompt_text, *"".join(row.completion_pieces)} == {"w"}

    # a name of several tokens is only seen in the whole text
    scorer(served, RecordOptions(tmp_path / "c", texts=True, redact=lambda text: text if len(text) < 6 else "…")).score(batch, step=0)
    row = read_record(tmp_path / "c").rollouts[0]
    assert (row.completion_text, row.completion_pieces) == ("…", None)
    scorer(served, RecordOptions(tmp_path / "d", texts=True, redact=str)).score(batch, step=0)
    row = read_record(tmp_path / "d").rollouts[0]
    assert "".join(row.completion_pieces) == row.completion_text

    def fails(text: str) -> str:
        raise RuntimeError("no names here")

    scorer(served, RecordOptions(tmp_path / "b", texts=True, redact=fails)).score(batch, step=0)
    assert [(row.completion_text, len(row.scores)) for row in read_record(tmp_path / "b").rollouts] == [(None, 1)] * 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("directory", ""),
        ("directory", 3),
        ("planned_steps", 0),
        ("rollouts_per_step", 1.5),
        ("late_steps", -1),
        ("held_out", "cheating"),
        ("texts", 1),
        ("redact", "names"),
        ("checker", "task"),
        ("labels_per_step", 3),
        ("batches_per_step", -1),
        ("alpha", 0.0),
        ("on_error", "ignore"),
    ],
)
def test_wrong_options_name_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"record\.{field}: expected .*got {value!r}"):
        RecordOptions(**{"directory": "x", field: value})


def test_token_ids_are_not_kept_where_texts_are_redacted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"record\.ids: token ids can be decoded to the text.*leave out ids or redact"):
        RecordOptions(tmp_path, ids=True, redact=str)


# ----------------------------------------------------------------------------------------------------------- probes, roles, readings


def test_each_probe_has_its_role_and_its_thresholds(served: RunningServer, tmp_path: Path) -> None:
    signals = (
        PENALTY,
        ProbeSignal("cheating", reduction="last", mode="monitor", threshold=0.25, name="last"),
        ProbeSignal("mood", mode="monitor", label="angry"),
        ProbeSignal("mood", mode="monitor", threshold=0.5, name="calm"),
    )
    one = scorer(served, RecordOptions(tmp_path, held_out=["mood"]), *signals)
    one.score(rollouts(1, 2), step=0)
    record = read_record(tmp_path)
    found = {probe.key: (probe.role, set(probe.thresholds)) for probe in record.header.probes}
    assert found == {"cheating@1": ("reward", {"mean", "last"}), "mood@1/angry": ("held_out", set()), "mood@1": ("held_out", {"mean"})}
    assert {key[0]: set() for key in record.table().scores} == {key: set() for key in found}
    assert set(record.rollouts[0].scores["cheating@1"]["frozen"]) == {"mean", "last", "max"}
    with pytest.raises(SignalError, match="held out"):
        scorer(served, RecordOptions(tmp_path, held_out=["cheating"]), PENALTY)


def test_signals_that_count_other_tokens_have_scores_of_their_own(served: RunningServer, tmp_path: Path) -> None:
    one = scorer(served, tmp_path, PENALTY, ProbeSignal("cheating", mode="monitor", mask="all", name="whole"))
    outcome = one.score([replace(rollout, mask=[1, *[0] * (len(rollout.completion) - 1)]) for rollout in rollouts(1, 3)], step=0)
    table = read_record(tmp_path).table()
    for key, name in (("cheating@1", "cheating"), ("cheating@1/whole", "whole")):
        np.testing.assert_array_equal(table.scores[key, "frozen", "mean"], outcome.values[name])
    assert not math.isclose(outcome.values["cheating"][0], outcome.values["whole"][0])


def test_what_cannot_be_audited_is_said_once(served: RunningServer, tmp_path: Path, caplog: Any) -> None:
    one = scorer(served, RecordOptions(tmp_path, planned_steps=2), ProbeSignal("mood", mode="reward"))
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            one.score(rollouts(1, 1), step=step)
    assert caplog.text.count("mood@1 has no threshold") == 1
    assert caplog.text.count("planned for 2 steps and has more") == 1


# ------------------------------------------------------------------------------------------------------------------------- labels


def is_even(rollout: Rollout) -> bool:
    return int(rollout.completion[0]) % 2 == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("batches", [1, 2, 0])
def test_a_checker_labels_what_the_plan_chooses_as_soon_as_a_step_is_whole(served: RunningServer, tmp_path: Path, batches: int) -> None:
    options = RecordOptions(tmp_path, checker=is_even, labels_per_step=8, batches_per_step=batches)
    one = scorer(served, options)
    truth = {}
    for step in range(3):
        halves = [rollouts(6, 4) for _ in range(1 if batches == 1 else 2)]
        for half in halves:
            one.score(half, step=step)
        labelled = {label.step for label in read_record(tmp_path).labels}
        assert labelled == set(range(step + 1 if batches else step))
        truth |= {(step, index): is_even(rollout) for index, rollout in enumerate(rollout for half in halves for rollout in half)}
    one.close()
    record = read_record(tmp_path)
    assert record.header.labels_per_step == 8
    place = {(row.step, row.rollout): number for number, row in enumerate(record.rollouts)}
    each = len(record.rollouts) // 3
    assert all((label.label == "yes") == truth[label.step, place[label.step, label.rollout] % each] for label in record.labels)
    assert all(4 <= sum(label.step == step for label in record.labels) <= 8 for step in range(3))
    labels = recorded_run(record, "cheating@1")[1]
    assert planned_by(record, read_run(record, record.table(), "cheating@1"))
    assert len(labels.rollout) == len(record.labels)


def test_a_checker_that_fails_says_unsure_or_ends_the_run(served: RunningServer, tmp_path: Path, caplog: Any) -> None:
    def fails(rollout: Rollout) -> bool:
        raise RuntimeError("no such problem")

    scorer(served, RecordOptions(tmp_path / "a", checker=fails)).score(rollouts(4, 2), step=0)
    assert {label.label for label in read_record(tmp_path / "a").labels} == {"unsure"}
    assert "no such problem" in caplog.text
    with pytest.raises(RuntimeError, match="no such problem"):
        scorer(served, RecordOptions(tmp_path / "b", checker=fails, on_error="raise")).score(rollouts(4, 2), step=0)


def test_the_record_needs_no_scipy() -> None:
    code = "import probescore_adapters, sys; print([name for name in ('scipy', 'torch') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------- the reference, and an audit


def test_a_run_recorded_by_its_trainer_is_audited(served: RunningServer, tmp_path: Path) -> None:
    """A run in which nothing changes: rollouts that the probe scores high have the behaviour."""
    base = rollouts(100, 6)
    values = ProbeScorer(PENALTY, served.address).score(base).values["cheating"]
    threshold = float(np.quantile(values, 0.8))
    signal = ProbeSignal("cheating", weight=2.0, threshold=threshold)
    truth = {rollout.completion.tobytes(): bool(value >= threshold) for rollout, value in zip(base, values, strict=True)}  # type: ignore[union-attr]

    def checker(rollout: Rollout) -> bool:
        return truth[rollout.completion.tobytes()]  # type: ignore[union-attr]

    one = scorer(served, RecordOptions(tmp_path, checker=checker, planned_steps=30), signal)
    one.record_reference(base, [checker(rollout) for rollout in base], random=True)
    order = np.random.default_rng(5)
    for step in range(12):
        prompts = order.permutation(100)[:40]
        one.score([base[6 * prompt + number] for prompt in prompts for number in range(6)], step=step)
    audit = audit_record(read_record(tmp_path))
    (reading,) = audit.readings
    assert reading.verdict is Verdict.NO_CHANGE
    assert not reading.audit.alarms
    assert len(audit.record.references) == 600
    assert reading.reference.counts.positives == sum(truth[rollout.completion.tobytes()] for rollout in base)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="the scorer has none"):
        scorer(served, None).record_reference(base, [True] * 600, random=True)
    with pytest.raises(ValueError, match="positive: 1 for 600 rollouts"):
        one.record_reference(base, [True], random=True)


# --------------------------------------------------------------------------------------------------------------------- real processes


def ranks(served: RunningServer, record: Path, first: int, last: int, world_size: int = 2) -> list[subprocess.Popen[str]]:
    """The ranks of a launch, as a launcher that gives it no name starts them."""
    command = [sys.executable, str(Path(__file__).parent / "rank_with_record.py"), served.address, str(record), str(first), str(last)]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    environments = [{**plain, "RANK": str(rank), "WORLD_SIZE": str(world_size)} for rank in range(world_size)]
    return [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for environment in environments]


def test_ranks_that_are_killed_lose_no_step_that_they_had_recorded(served: RunningServer, tmp_path: Path) -> None:
    first = ranks(served, tmp_path, 0, 10_000)
    reached = []
    for process in first:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 6:
                break
    for process in first:
        process.kill()
        assert process.stdout is not None
        reached.append(max([6, *(int(line) for line in process.stdout.read().split())]))
        process.wait()
    killed = read_record(tmp_path)
    assert {(row.step, row.rollout) for row in killed.rollouts} >= {
        (step, f"{rank}.{number}") for rank in range(2) for step in range(reached[rank] + 1) for number in range(4)
    }
    assert killed.torn_lines <= 2
    second = ranks(served, tmp_path, 4, 5)
    assert [process.wait(timeout=120) for process in second] == [0, 0]
    record = read_record(tmp_path)
    assert recorded(tmp_path) == dict.fromkeys(range(6), 8)
    assert record.void_rows >= 2 * 4 * (min(reached) - 3)
    assert record.header.world_size == 2


def test_a_record_costs_a_step_some_milliseconds(served: RunningServer, tmp_path: Path) -> None:
    """Of the trainer's processor time, with everything in it; ``python -m benchmarks record`` measures it."""
    everything = RecordOptions(tmp_path, ids=True, checker=is_even, labels_per_step=32)
    ways = {"no record": scorer(served, None), "record": scorer(served, everything)}
    took: dict[str, list[float]] = {way: [] for way in ways}
    for step in range(4):
        batch = rollouts(16, 8)
        for way, one in ways.items():
            started = time.process_time()
            one.score(batch, step=step)
            took[way].append(time.process_time() - started)
    added = np.median(took["record"]) - np.median(took["no record"])
    assert added < 0.1  # 128 rollouts: 0.01
