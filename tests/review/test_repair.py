"""From labels to another probe: every step through the running application, with a real model and real probe files."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from models import BOS, HIDDEN_SIZE, VOCAB_SIZE, tiny_model
from reviewed import Refused, Review

from probescore import Completion, RolloutGroup
from probescore_audit import calibrate, lines_to_fit
from probescore_audit.record import LabelRow, RecordedProbe, RecordWriter, RolloutRow, RunHeader, read_record
from probescore_probes import ReferenceModel, linear_probe, read_probe_file, write_probe
from probescore_server import Engine

PROMPTS, EACH = 60, 4


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def probes(model, tmp_path_factory):
    """A probe that sees little of what the labels are by, and the one that they are by, which is not served."""
    folder = tmp_path_factory.mktemp("probes")
    random = np.random.default_rng(0)
    truth = random.standard_normal(HIDDEN_SIZE)
    golden = [([BOS, *random.integers(4, VOCAB_SIZE, 5)], random.integers(4, VOCAB_SIZE, 7)) for _ in range(2)]
    reference = ReferenceModel.load(model)
    for name, direction in (("cheating", 0.2 * truth + random.standard_normal(HIDDEN_SIZE)), ("truth", truth)):
        target = folder / f"{name}.onnx" if name == "cheating" else folder / f"{name}.kept"
        calibrations = [calibrate(random.standard_normal(100) - 3, false_positive_rate=0.05, dataset="honest rollouts")]
        common = {"taps": ["resid_post.1"], "golden": golden, "calibrations": calibrations}
        write_probe(folder / f"{name}.onnx", linear_probe(direction), reference, name=name, version="1", **common)
        (folder / f"{name}.onnx").rename(target)
    return folder


@pytest.fixture(scope="module")
def run(model, probes, tmp_path_factory):
    """A record of 240 rollouts with ids, half of which are labelled by the other direction, as it is served."""
    folder = tmp_path_factory.mktemp("repaired") / "run"
    random = np.random.default_rng(3)
    rollouts = [
        ([BOS, *random.integers(4, VOCAB_SIZE, 5).tolist()], random.integers(4, VOCAB_SIZE, random.integers(5, 12)).tolist())
        for _ in range(PROMPTS)
        for _ in range(EACH)
    ]
    (probes / "truth.kept").rename(probes / "truth.onnx")
    engine = Engine.load(str(model), [str(probes / "cheating.onnx"), str(probes / "truth.onnx")])
    (probes / "truth.onnx").rename(probes / "truth.kept")
    answered = engine.score([RolloutGroup(prompt, [Completion(completion)]) for prompt, completion in rollouts])
    scores = [{key.partition("@")[0]: float(each.value) for key, each in group.completions[0].scores.items()} for group in answered.groups]
    middle = np.median([each["truth"] for each in scores])
    threshold = float(read_probe_file(probes / "cheating.onnx").manifest.calibrations[0].threshold)
    header = RunHeader(run_id="repaired", planned_steps=2, probes=[RecordedProbe(key="cheating@1", thresholds={"mean": threshold})])
    with RecordWriter(folder, header, keep_texts=True) as writer:
        rows = [
            RolloutRow(
                step=index % 2,
                rollout=f"{index // EACH}.{index % EACH}",
                prompt=f"{index // EACH}",
                scores={"cheating@1": {"frozen": {"mean": each["cheating"]}}},
                text_sha256=f"{index}",
                prompt_ids=prompt,
                completion_ids=completion,
            )
            for index, ((prompt, completion), each) in enumerate(zip(rollouts, scores, strict=True))
        ]
        writer.append(rows)
        writer.append(
            LabelRow(
                step=row.step,
                rollout=row.rollout,
                label="yes" if each["truth"] > middle else "no",
                source="person",
                text_sha256=row.text_sha256,
                inclusion=1.0,
                stratum="rest",
                floor=True,
            )
            for row, each in zip(rows, scores, strict=True)
        )
    return folder


def test_lines_to_fit_keep_prompts_together_and_their_split(run):
    lines = lines_to_fit(read_record(run))

    splits = {}
    for line in lines:
        splits.setdefault(line["group"], set()).add(line["split"])
    assert all(len(of) == 1 for of in splits.values())
    counts = {name: sum(line["split"] == name for line in lines) for name in ("train", "calibration", "test")}
    assert sum(counts.values()) == 240
    assert min(counts.values()) > 20
    assert all(line["prompt"][0] == BOS and line["completion"]["ids"] for line in lines)


def test_lines_to_fit_calibrate_on_what_was_drawn_at_random_alone(tmp_path):
    with RecordWriter(tmp_path / "run", RunHeader(run_id="r", planned_steps=1), keep_texts=True) as writer:
        writer.append(
            RolloutRow(step=0, rollout=f"{index}", prompt=f"{index}", scores={}, prompt_text="p", completion_text="c")
            for index in range(90)
        )
        labels = ["yes", "no", "unsure"]
        writer.append(
            LabelRow(step=0, rollout=f"{index}", label=labels[index % 3], source="person", inclusion=0.5, floor=index % 2 == 0)
            for index in range(90)
        )
        writer.append([LabelRow(step=0, rollout="0", label="no", source="person", second=True)])
    lines = {line["group"]: line for line in lines_to_fit(read_record(tmp_path / "run"))}

    assert not any(int(name.split()[1]) % 2 for name, line in lines.items() if line["split"] == "calibration")
    assert any(int(name.split()[1]) % 2 for name, line in lines.items() if line["split"] != "calibration")
    assert not any(int(name.split()[1]) % 3 == 2 for name in lines), "unsure"
    assert lines.get("prompt 0", {"completion": {"label": False}})["completion"]["label"] is False
    RecordWriter(tmp_path / "empty", RunHeader(run_id="r", planned_steps=1)).close()
    with pytest.raises(ValueError, match="nothing is labelled"):
        lines_to_fit(read_record(tmp_path / "empty"))


def done(review, step, **options):
    job = review.post("/api/runs/0/repair", {"step": step, "options": options})["job"]
    if step in ("audit", "refit"):
        with pytest.raises(Refused, match="at work"):
            review.post("/api/runs/0/repair", {"step": "audit"})
    for _ in range(1200):
        found = review.get(f"/api/jobs/{job}")
        if found["state"] != "running":
            return found
        time.sleep(0.1)
    raise AssertionError("it does not end")


@pytest.mark.slow
def test_from_labels_to_another_probe(model, probes, run, tmp_path):
    more = ("--model", str(model), "--probes", str(probes))
    with Review(run, *more, cache=tmp_path / "cache") as review:
        steps = review.get("/api/runs/0/repair")
        assert [step["step"] for step in steps["steps"] if step["ready"]] == [
            "audit",
            "recalibrate",
            "refit",
            "compare",
            "replace",
            "discard",
        ]
        failed = done(review, "audit")
        assert failed["state"] == "failed", "the record has no reference"
        assert "reference" in failed["output"]

        calibrated = done(review, "recalibrate", false_positive_rate=0.2)
        assert calibrated["state"] == "done", calibrated["output"]
        assert "probescore labels export" in calibrated["command"]
        assert "probescore probes calibrate" in calibrated["command"]
        old, new = calibrated["result"]["old"], calibrated["result"]["new"]
        rows = review.get("/api/runs/0/rollouts", limit=1000)["rows"]
        for side in (old, new):
            assert side["flagged"] == sum(row["score:cheating@1:frozen"] >= side["threshold"] for row in rows)
        assert len(calibrated["result"]["differently"]) == abs(old["flagged"] - new["flagged"])
        assert done(review, "discard", new="cheating@2")["state"] == "done"

        fitted = done(review, "refit", kind="difference-of-means")
        assert fitted["state"] == "done", fitted["output"]
        compared = done(review, "compare")
        assert compared["state"] == "done", compared["output"]
        aurocs = {side: compared["result"][side]["AUROC, held-out labels"][0] for side in ("old", "new")}
        assert aurocs["new"] > aurocs["old"]
        before = {path.name: path.read_bytes() for path in probes.iterdir()}
        assert done(review, "replace")["state"] == "done"
        assert {path.name: path.read_bytes() for path in probes.iterdir() if path.name in before} == before
        assert read_probe_file(probes / "cheating-2.onnx").manifest.key == "cheating@2"
        assert done(review, "replace", new="cheating@2")["state"] == "failed", "no file is overwritten"
        assert [job["step"] for job in review.get("/api/runs/0/jobs")["jobs"]][-1] == "audit"
        for step, options, said in (
            ("nix", {}, "step"),
            ("recalibrate", {"probe": "nix@1"}, "probe"),
            ("recalibrate", {"false_positive_rate": 2}, "rate"),
            ("refit", {"kind": "--help"}, "kind"),
            ("replace", {"new": "../x@1"}, "new"),
        ):
            with pytest.raises(Refused, match=said):
                review.post("/api/runs/0/repair", {"step": step, "options": options})


def test_without_probe_files_the_audit_alone_can_be_asked_for(run, tmp_path):
    with Review(run, cache=tmp_path / "cache") as review:
        steps = review.get("/api/runs/0/repair")
        assert "--model" in steps["said"]
        assert [step["step"] for step in steps["steps"] if step["ready"]] == ["audit"]
        with pytest.raises(Refused, match="--model"):
            review.post("/api/runs/0/repair", {"step": "refit"})


def test_labels_export_is_a_command(run, tmp_path):
    command = [sys.executable, "-m", "probescore_server.cli", "labels", "export", run, "-o", tmp_path / "lines.jsonl"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    assert "wrote 240 rollouts" in ran.stdout
    assert len([json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]) == 240
