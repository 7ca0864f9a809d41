"""``make experiment-real``: what becomes of a probe while a real language model learns to agree with what its users get wrong.

SmolLM2-135M-Instruct is trained in TRL with a LoRA adapter, the shipped adapter of probescore and a real server, which reads the frozen
model and the policy; each run is recorded, labelled from the known facts, and audited as it goes. Hours. What is finished is kept, and a
run that was stopped goes on from its last checkpoint, five steps back at most.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "truth"))

from before_training import Step, make_probe, make_reference, read_reference, write_reference
from fixed import CONDITIONS, PROBE, RECIPE, SEEDS, SIZES, Recipe, Sizes
from outcomes import outcome_of, tables
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from run_settings import RunSettings
from smollm2 import save_smollm2

from probescore import DeadlineExceededError, ProbeClient, TransientError

TRAINING = Path(__file__).with_name("policy_training.py")
PROBESCORE = (sys.executable, "-m", "probescore_server.cli")
START_SECONDS = 300
STOP_SECONDS = 30
KEPT_LINES = 30
AUDIT_SECONDS = 120
"""Between two audits of a run while it trains."""


class Experiment:
    """A folder, in which everything is left and found again."""

    def __init__(self, folder: Path, progress: Progress, recipe: Recipe, sizes: Sizes) -> None:
        self.folder, self._progress, self._recipe, self._sizes = folder, progress, recipe, sizes
        self.model = folder / "model"
        self.results = folder / "results.jsonl"
        self._writing = Lock()

    def step(self, name: str, total: int) -> Callable[[int], None]:
        task = self._progress.add_task(name, total=total, said="")
        return lambda done: self._progress.advance(task, done)

    def say(self, text: str) -> None:
        self._progress.console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False)

    def outcomes(self) -> list[dict[str, Any]]:
        """The finished runs, the last line of each."""
        lines = map(json.loads, self.results.read_text().splitlines()) if self.results.exists() else iter(())
        size = self._recipe.steps, self._recipe.prompts * self._recipe.samples
        return list(
            {(line["condition"], line["seed"]): line for line in lines if (line["steps"], line["rollouts a step"]) == size}.values()
        )

    def probes(self) -> dict[int, dict[str, Any]]:
        found = {path: path.parents[1].name.removeprefix("seed-") for path in sorted(self.folder.glob("seed-*/before/probe.json"))}
        return {int(seed): json.loads(path.read_text()) for path, seed in found.items()}

    def prepare(self) -> None:
        if not (self.model / "model.safetensors").exists():
            self.say("unpacking SmolLM2-135M-Instruct (538 MB)")
            draft = self.model.with_suffix(".part")
            save_smollm2(draft)
            draft.rename(self.model)  # whole, or not there

    def prepare_seed(self, seed: int, conditions: list[str]) -> None:
        step: Step = self.step
        before = self._before(seed)
        make_probe(before, self.model, seed, self._sizes.probe_prompts, step)
        for name in conditions:
            topics = CONDITIONS[name].topics
            make_reference(self._reference(seed, name), before, self.model, seed, topics, self._sizes.reference_prompts, step)

    def run(self, seed: int, name: str) -> None:
        """Trains one condition, unless it has finished before, and writes its line."""
        if any((each["condition"], each["seed"]) == (name, seed) for each in self.outcomes()):
            return
        folder, before = self.folder / f"seed-{seed}" / name, self._before(seed)
        threshold = json.loads((before / "probe.json").read_text())["threshold"]
        write_reference(folder / "record", name, self._recipe.steps, threshold, self._reference(seed, name))
        task = self._progress.add_task(f"seed {seed}, {CONDITIONS[name].title}", total=self._recipe.steps, said="")
        started = time.monotonic()

        def on_step(line: dict[str, Any]) -> None:
            self._progress.update(task, completed=line["step"], said=f"{line['seconds']:.0f} s a step")
            if not self._progress.console.is_terminal:
                self.say(f"seed {seed}, {name}: step {line['step']} of {self._recipe.steps}, {line['seconds']:.0f} s")

        with serving(self.model, before / f"{PROBE}.onnx", folder) as address, auditing(folder):
            settings = RunSettings(name, seed, str(self.model), str(before / "direction.npz"), str(folder), address)
            settings = replace(settings, steps=self._recipe.steps, prompts=self._recipe.prompts, samples=self._recipe.samples)
            keep_settings(settings, folder / "settings.json")
            training(folder, on_step)
        with (folder / "audit.json").open("w") as output:  # the last word, on the whole run
            subprocess.run(
                [*PROBESCORE, "audit", folder / "record", "--report", folder / "audit.html", "--json"], stdout=output, check=False
            )
        about = {"date": date.today().isoformat(), "hardware": hardware(), "versions": versions()}
        outcome = outcome_of(settings, threshold, read_reference(self._reference(seed, name)), about)
        with self._writing, self.results.open("a") as lines:
            lines.write(json.dumps(outcome) + "\n")
        self.say(f"seed {seed}, {name}: done in {(time.monotonic() - started) / 60:.0f} minutes")
        for said in outcome["audit"]:
            self.say(f"  {said['reading']}: {said['verdict']}. {said['sentence']}")

    def _before(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}" / "before"

    def _reference(self, seed: int, condition: str) -> Path:
        return self._before(seed) / f"reference-{len(CONDITIONS[condition].topics)}-topics.jsonl"


def keep_settings(settings: RunSettings, path: Path) -> None:
    """Writes what a run needs to know. One that was begun otherwise is not gone on with: its checkpoint and record are of another run."""
    if path.exists() and replace(RunSettings(**json.loads(path.read_text())), address=settings.address) != settings:
        raise RuntimeError(f"{path.parent}: this run was begun with other settings; give another --folder, or remove it")
    settings.write(path)


@contextmanager
def serving(model: Path, probe: Path, folder: Path) -> Iterator[str]:
    """Starts a server that may load readings from a run's folder, and gives its address once it scores; ends it in the end."""
    with tempfile.TemporaryDirectory() as short, (folder / "server.log").open("a") as log:  # a socket's path must be short
        socket = Path(short) / "socket"
        command = [*PROBESCORE, "serve", "--model", model, "--probes", probe, "--unix-socket", socket, "--metrics-port", "0"]
        command += ["--admin", "--readings-root", folder]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        with ended(process):
            wait_until_ready(process, f"unix:{socket}", folder)
            yield f"unix:{socket}"


def wait_until_ready(process: subprocess.Popen[bytes], address: str, folder: Path) -> None:
    end = time.monotonic() + START_SECONDS
    with ProbeClient(address) as client:
        while process.poll() is None and time.monotonic() < end:
            try:
                client.wait_until_ready(timeout=5)
            except (TransientError, DeadlineExceededError):
                continue
            return
    raise RuntimeError(f"probescore serve did not become ready; the end of {folder.name}/server.log says why")


@contextmanager
def auditing(folder: Path) -> Iterator[None]:
    """Audits a run's record while it grows: the page ``audit.html`` is written anew, and what was said is in ``audit.log``."""
    command = [*PROBESCORE, "audit", folder / "record", "--follow", "--interval", str(AUDIT_SECONDS), "--report", folder / "audit.html"]
    with (folder / "audit.log").open("a") as log, ended(subprocess.Popen(command, stdout=log, stderr=log)):
        yield


RUNNING: list[subprocess.Popen[Any]] = []


@contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Ends a process in the end."""
    RUNNING.append(process)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        RUNNING.remove(process)


def end_with(pool: ThreadPoolExecutor) -> None:
    """Has Ctrl-C and SIGTERM end whatever runs, and begin nothing more. A run that is ended so goes on with the next start."""

    def end(*_: object) -> None:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(RUNNING):
            process.terminate()
        sys.exit(130)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def training(folder: Path, on_step: Callable[[dict[str, Any]], None]) -> None:
    """Trains in a process of its own; what it says is kept in ``training.log``."""
    last: deque[str] = deque(maxlen=KEPT_LINES)
    command = [sys.executable, str(TRAINING), str(folder / "settings.json")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with ended(process), (folder / "training.log").open("a") as log:
        for line in process.stdout or ():
            if line.startswith('{"step"'):
                on_step(json.loads(line))
            else:
                last.append(line)
                log.write(line)
        process.wait()
    if process.returncode:
        raise RuntimeError(f"training ended with exit code {process.returncode}:\n{''.join(last)}")


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or "unknown")
    return f"{name}, {os.cpu_count()} cores, one thread a process"


def versions() -> str:
    return ", ".join(f"{package} {version(package)}" for package in ("trl", "peft", "transformers", "torch"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("experiment-real"), help="where everything is left (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(SEEDS), help="(default: those that were fixed beforehand, %(default)s)"
    )
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS), help="only these")
    look = "others than %(default)s are for a look, not for a claim"
    parser.add_argument("--steps", type=int, default=RECIPE.steps, help=f"of training; {look}")
    parser.add_argument("--prompts", type=int, default=RECIPE.prompts, help=f"of a step; {look}")
    parser.add_argument("--samples", type=int, default=RECIPE.samples, help=f"answers to each prompt; {look}")
    parser.add_argument(
        "--reference-prompts", type=int, default=SIZES.reference_prompts, help="answered before training (default: %(default)s)"
    )
    parser.add_argument("--probe-prompts", type=int, default=SIZES.probe_prompts, help="answered for the probe (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with a core or two (default: %(default)s)")
    options = parser.parse_args()
    folder: Path = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=True)
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[said]}"),
        TimeElapsedColumn(),
    ]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        recipe = replace(RECIPE, steps=options.steps, prompts=options.prompts, samples=options.samples)
        experiment = Experiment(folder, progress, recipe, Sizes(options.probe_prompts, options.reference_prompts))
        experiment.prepare()
        for seed in options.seeds:  # one seed after the other, so that whoever stops early has whole seeds
            experiment.prepare_seed(seed, options.conditions)
            with ThreadPoolExecutor(options.jobs) as pool:
                end_with(pool)
                for _ in pool.map(experiment.run, [seed] * len(options.conditions), options.conditions):
                    pass
            text = tables(experiment.outcomes(), experiment.probes())
            (folder / "tables.md").write_text(text)
    console.print(f"\n{text}\n{folder / 'tables.md'} and results.jsonl have this; each run has its record, audit.html and audit.log.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
