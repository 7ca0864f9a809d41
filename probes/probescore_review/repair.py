"""Repairs a probe with the labels that there are: audits again, finds another threshold, fits anew, compares, and replaces its file.

Each step is commands of ``probescore``, which are shown, and can be given by hand. New files are kept in a folder beside the record until
they replace what is served.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from probescore.types import FROZEN
from probescore_review.columns import ProbeReading, probe_readings
from probescore_review.index import Index
from probescore_review.jobs import FileChange, Job, Jobs, JobStep, ShellCommand
from probescore_review.overview import Overview
from probescore_review.queries import Queries

FOLDER = "review-repair"
_KINDS = ("logistic", "difference-of-means", "lda", "mean-of-sigmoids", "mlp", "attention", "rolling-max")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.]{0,31}")
_MOST_DIFFERENT = 200


@dataclass(frozen=True)
class RepairableProbe:
    """Value object with what a repair has to know of a probe file.

    Attributes:
        key: ``name@version``.
        path: where it is.
        thresholds: its threshold by reduction.
    """

    key: str
    path: Path
    thresholds: Mapping[str, float]


@dataclass(frozen=True)
class RepairSettings:
    """Value object that says with what probes are repaired.

    Attributes:
        model: the frozen model: a folder, or an id on the Hugging Face hub; empty = probes cannot be repaired.
        probes: the folder of probe files that a server follows.
        address: address of the server that is told to read them; empty = it looks for itself.
        anchors: file of labelled texts on which old and new are compared, beside held-out labels.
        read_files: reads what a folder has of probe files.
    """

    model: str = ""
    probes: Path | None = None
    address: str = ""
    anchors: Path | None = None
    read_files: Callable[[Path], Sequence[RepairableProbe]] = lambda folder: ()


class Repair:
    """Repairs the probes of a run.

    Args:
        index: the index of the record.
        queries: reads rows of the table.
        overview: has what the audit said, which an audit changes.
        jobs: runs commands.
        run: the run's name among the jobs.
        settings: with what probes are repaired.
    """

    def __init__(self, index: Index, queries: Queries, overview: Overview, jobs: Jobs, run: str, settings: RepairSettings) -> None:
        self._index = index
        self._queries = queries
        self._overview = overview
        self._jobs = jobs
        self._run = run
        self._settings = settings
        self._folder = index.folder / FOLDER
        self._data = self._folder / "labelled.jsonl"

    def steps(self) -> dict[str, Any]:
        """Returns the steps of a repair and what each can be asked for."""
        files = self._served()
        ready = bool(self._settings.model and files)
        said = (
            None
            if ready
            else "Audits go without; for the other steps start the review with --model and --probes, the folder of probe files."
        )
        keys = [each.key for each in files]
        probe = {"name": "probe", "title": "probe", "kind": "choice", "choices": keys, "value": keys[0] if keys else None}
        rate = {"name": "false_positive_rate", "title": "false-positive rate", "kind": "number", "value": 0.05}
        kind = {"name": "kind", "title": "kind", "kind": "choice", "choices": list(_KINDS), "value": _KINDS[0]}
        new = [each.key for each in self._made()]
        made = {"name": "new", "title": "new probe", "kind": "choice", "choices": new, "value": new[-1] if new else None}

        def step(name: str, *options: dict[str, Any], needs: bool = ready) -> dict[str, Any]:
            return {"step": name, "options": list(options), "ready": needs}

        return {
            "said": said,
            "steps": [
                step("audit", needs=True),
                step("recalibrate", probe, rate),
                step("refit", probe, kind, rate),
                step("compare", probe, made, needs=ready),
                step("replace", made, needs=ready),
                step("discard", made, needs=ready),
            ],
        }

    def begin(self, step: str, options: Mapping[str, Any]) -> Job:
        """Begins a step.

        Raises:
            ValueError: there is no such step, or it cannot be done with these options.
            JobConflict: another step of the run is at work.
        """
        makers: dict[str, Callable[[Mapping[str, Any]], tuple[list[JobStep], Callable[[], dict[str, Any]]]]] = {
            "audit": self._audit,
            "recalibrate": self._recalibrate,
            "refit": self._refit,
            "compare": self._compare,
            "replace": self._replace,
            "discard": self._discard,
        }
        if step not in makers:
            raise ValueError(f"step: {step[:40]!r}; give one of {', '.join(makers)}")
        self._folder.mkdir(exist_ok=True)
        steps, result = makers[step](options)
        return self._jobs.begin(self._run, step, steps, result)

    # the steps

    def _audit(self, options: Mapping[str, Any]) -> tuple[list[JobStep], Callable[[], dict[str, Any]]]:
        del options
        printed = self._folder / "audit.json"

        def result() -> dict[str, Any]:
            self._overview.forget()
            readings = json.loads(printed.read_text())["readings"]
            names = ("probe", "reading", "verdict", "sentence", "next_step", "labels")
            return {"rows": [{name: each[name] for name in names} for each in readings]}

        return [ShellCommand(("audit", str(self._index.folder), "--json"), printed)], result

    def _recalibrate(self, options: Mapping[str, Any]) -> tuple[list[JobStep], Callable[[], dict[str, Any]]]:
        old = self._file_of(options.get("probe"), self._served(), "probe")
        rate = _rate(options)
        version = self._next_version(old.key)
        new = self._path_of(old.key, version)
        reading = self._reading_of(old.key)
        reduction = () if reading is None else ("--reduction", reading.reduction)
        command = (
            *("probes", "calibrate", str(old.path), str(self._data), "--model", self._settings.model),
            *("--false-positive-rate", f"{rate:g}", "-o", str(new), "--version", version),
            *("--dataset", f"labelled rollouts of {self._index.header().run_id}", *reduction),
        )
        return [self._labelled(), ShellCommand(command)], lambda: self._recalibrated(old, new, reading)

    def _refit(self, options: Mapping[str, Any]) -> tuple[list[JobStep], Callable[[], dict[str, Any]]]:
        old = self._file_of(options.get("probe"), self._served(), "probe")
        kind = options.get("kind") or _KINDS[0]
        if kind not in _KINDS:
            raise ValueError(f"kind: {str(kind)[:40]!r}; give one of {', '.join(_KINDS)}")
        version = self._next_version(old.key)
        new = self._path_of(old.key, version)
        report = new.with_suffix(".html")
        command = (
            *("probes", "fit", str(self._data), "--model", self._settings.model, "-o", str(new), "--kind", str(kind)),
            *("--name", old.key.partition("@")[0], "--probe-version", version, "--fpr", f"{_rate(options):g}", "--report", str(report)),
        )

        def result() -> dict[str, Any]:
            return {
                "new": dict(self._read(new).thresholds),
                "old": dict(old.thresholds),
                "sentence": f"{old.key} was fitted anew as version {version}.",
            }

        return [self._labelled(), ShellCommand(command)], result

    def _compare(self, options: Mapping[str, Any]) -> tuple[list[JobStep], Callable[[], dict[str, Any]]]:
        old = self._file_of(options.get("probe"), self._served(), "probe")
        new = self._file_of(options.get("new"), self._made(), "new")
        data = {"held-out labels": self._data} | ({"anchors": self._settings.anchors} if self._settings.anchors else {})
        printed = {name: self._folder / f"compare-{name.replace(' ', '-')}.json" for name in data}
        commands = [
            ShellCommand(
                (
                    "probes",
                    "compare",
                    str(old.path),
                    str(new.path),
                    str(path),
                    "--model",
                    self._settings.model,
                    "--json",
                    str(printed[name]),
                )
            )
            for name, path in data.items()
        ]

        def result() -> dict[str, Any]:
            found: dict[str, Any] = {"old": {}, "new": {}}
            for name, path in printed.items():
                numbers = json.loads(path.read_text())
                for side, each in zip(("old", "new"), numbers["probes"], strict=True):
                    auroc = each["auroc"]
                    found[side][f"AUROC, {name}"] = [auroc["value"], auroc["low"], auroc["high"]] if isinstance(auroc, dict) else auroc
                    found[side][f"threshold, {name}"] = each["threshold"]
                for group, flags in (("recall", numbers["flags_of_positives"]), ("false alarms", numbers["flags_of_negatives"])):
                    if flags and (count := sum(flags[part] for part in ("both", "only_first", "only_second", "neither"))):
                        found["old"][f"{group}, {name}"] = (flags["both"] + flags["only_first"]) / count
                        found["new"][f"{group}, {name}"] = (flags["both"] + flags["only_second"]) / count
            return found

        return [self._labelled(), *commands], result

    def _replace(self, options: Mapping[str, Any]) -> tuple[list[JobStep], Callable[[], dict[str, Any]]]:
        new = self._file_of(options.get("new"), self._made(), "new")
        folder = self._settings.probes
        assert folder is not None  # noqa: S101 - _made is empty without
        parts = [path for path in (_adapter_of(new.path), new.path) if path.exists()]  # the adapter first: the file needs it
        steps: list[JobStep] = [FileChange(f"cp {path} {folder / path.name}", partial(_copy, path, folder)) for path in parts]
        if self._settings.address:
            steps.append(ShellCommand(("probes", "reload", "--address", self._settings.address)))
        how = (
            f"the server at {self._settings.address} was told"
            if self._settings.address
            else "a server with --watch-probes follows by itself"
        )
        return steps, lambda: {"sentence": f"{new.key} is in {folder.name}; {how}. Its bare name now means this version."}

    def _discard(self, options: Mapping[str, Any]) -> tuple[list[JobStep], Callable[[], dict[str, Any]]]:
        new = self._file_of(options.get("new"), self._made(), "new")
        parts = [
            path
            for path in (new.path, _adapter_of(new.path), new.path.with_suffix(".html"), new.path.with_suffix(".json"))
            if path.exists()
        ]
        steps: list[JobStep] = [FileChange(f"rm {path}", path.unlink) for path in parts]
        return steps, lambda: {"sentence": f"{new.key} was discarded; what is served stays as it is."}

    def _recalibrated(self, old: RepairableProbe, new: Path, reading: ProbeReading | None) -> dict[str, Any]:
        """Returns the old threshold beside the new one, and which rollouts of the record the new one flags differently."""
        found = self._read(new)
        if reading is None:
            return {"old": dict(old.thresholds), "new": dict(found.thresholds)}
        before = reading.threshold if reading.threshold is not None else old.thresholds.get(reading.reduction)
        after = found.thresholds.get(reading.reduction)
        if before is None or after is None:
            return {"old": dict(old.thresholds), "new": dict(found.thresholds)}
        count = f"SELECT COUNT(*) FROM rollouts WHERE {reading.sql} >= ?"  # noqa: S608 - a column of ours
        flagged = [(self._index.row(count, (limit,)) or (0,))[0] for limit in (before, after)]
        low, high = sorted((before, after))
        between = self._index.rows(
            f"SELECT id, {reading.sql} FROM rollouts WHERE {reading.sql} >= ? AND {reading.sql} < ? ORDER BY {reading.sql} LIMIT ?",  # noqa: S608
            (low, high, _MOST_DIFFERENT),
        )
        rows = self._queries.shown([row[0] for row in between])
        return {
            "sentence": f"On the record the new threshold flags {flagged[1]:,} rollouts, the old one {flagged[0]:,}.",
            "old": {"threshold": before, "flagged": flagged[0]},
            "new": {"threshold": after, "flagged": flagged[1]},
            "differently": [
                {
                    "rollout": row["rollout"],
                    "old": row[reading.name] >= before,
                    "new": row[reading.name] >= after,
                    "snippet": row["snippet"],
                }
                for row in rows
            ],
        }

    # files

    def _labelled(self) -> ShellCommand:
        return ShellCommand(("labels", "export", str(self._index.folder), "-o", str(self._data)))

    def _served(self) -> Sequence[RepairableProbe]:
        return self._settings.read_files(self._settings.probes) if self._settings.probes is not None else ()

    def _made(self) -> Sequence[RepairableProbe]:
        return self._settings.read_files(self._folder) if self._settings.probes is not None and self._folder.is_dir() else ()

    def _file_of(self, key: object, files: Sequence[RepairableProbe], name: str) -> RepairableProbe:
        if not self._settings.model or self._settings.probes is None:
            raise ValueError("start the review with --model and --probes, the folder of probe files, to repair probes")
        if key is None and files:
            return files[-1] if name == "new" else files[0]
        found = next((each for each in files if each.key == key), None)
        if found is None:
            raise ValueError(f"{name}: {str(key)[:80]!r}; there is {', '.join(each.key for each in files) or 'none'}")
        return found

    def _read(self, path: Path) -> RepairableProbe:
        found = next((each for each in self._settings.read_files(self._folder) if each.path.name == path.name), None)
        if found is None:
            raise ValueError(f"{path.name}: it was not written")
        return found

    def _next_version(self, key: str) -> str:
        """Returns a version that no file of this name has: numbers count on."""
        name = key.partition("@")[0]
        taken = {each.key.partition("@")[2] for each in (*self._served(), *self._made()) if each.key.partition("@")[0] == name}
        numbers = [int(version) for version in taken if version.isdecimal()]
        version = str(max(numbers, default=1) + 1)
        if not _VERSION.fullmatch(version):
            raise ValueError(f"version: {version}; move the probe's files to shorter versions")
        return version

    def _path_of(self, key: str, version: str) -> Path:
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", key.partition("@")[0])
        return self._folder / f"{name}-{version}.onnx"

    def _reading_of(self, key: str) -> ProbeReading | None:
        """Returns the scores of a probe on the frozen model, by which it is calibrated; or of another version."""
        of_frozen = [each for each in probe_readings(self._index) if each.reading == FROZEN]
        name = key.partition("@")[0]
        same = [each for each in of_frozen if each.probe == key] or [each for each in of_frozen if each.probe.partition("@")[0] == name]
        return same[-1] if same else None


def _rate(options: Mapping[str, Any]) -> float:
    rate = options.get("false_positive_rate", 0.05)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < 1:
        raise ValueError(f"false_positive_rate: {str(rate)[:20]}; give a share between 0 and 1")
    return float(rate)


def _adapter_of(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".onnx") + ".adapter.safetensors")


def _copy(path: Path, folder: Path) -> None:
    """Copies a file under another name, and renames it when it is whole: a server that looks meanwhile never reads half of it."""
    target = folder / path.name
    if target.exists():
        raise ValueError(f"{path.name}: {folder.name} has a file of this name; discard this one, and make it anew")
    hidden = folder / f".{path.name}-{os.getpid()}"
    try:
        shutil.copyfile(path, hidden)
        hidden.replace(target)
    finally:
        hidden.unlink(missing_ok=True)
