"""Runs: one condition of one seed, trained in TRL's environment beside a server of its own."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from base import Base
from serving import server
from training_settings import RunSettings

TRAINING = Path(__file__).with_name("training.py")
KEPT_LINES = 30


def train(settings: RunSettings, base: Base, python: Path, on_step: Callable[[int, float], None]) -> None:
    """Trains, unless the run is there already. ``on_step`` is told the step and the share of its rollouts that cheated.

    Raises:
        RuntimeError: training failed; the error ends with what it printed last.
    """
    folder, mark = Path(settings.folder), Path(settings.folder) / "finished.json"
    wanted = json.dumps(vars(replace(settings, address="")))
    if mark.exists() and mark.read_text() == wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for former in (folder / "record").glob("*.jsonl"):  # of a run that did not finish
        former.unlink()
    options = ("--readings-root", folder, "--admin", "--log-format", "json")
    with (
        tempfile.TemporaryDirectory() as short,
        server(base.model, base.probe, Path(short) / "socket", folder / "server.log", *options) as address,
    ):
        settings = replace(settings, address=address)
        settings.write(folder / "settings.json")
        follow([str(python), str(TRAINING), str(folder / "settings.json")], on_step)
    mark.write_text(wanted)


def follow(command: list[str], on_step: Callable[[int, float], None]) -> None:
    """Runs a program, and passes on what it says of each step.

    Raises:
        RuntimeError: it failed.
    """
    last: deque[str] = deque(maxlen=KEPT_LINES)
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        try:
            assert process.stdout is not None  # noqa: S101 - it was asked for
            for line in process.stdout:
                if line.startswith('{"step"'):
                    said = json.loads(line)
                    on_step(said["step"], said["cheating"])
                else:
                    last.append(line)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise RuntimeError(f"training ended with exit code {process.returncode}:\n{''.join(last)}")
