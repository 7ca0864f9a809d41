"""Runs the commands of a repair, one after the other, and keeps what they print."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

_MOST_OUTPUT = 200_000
_KEPT_JOBS = 50


class JobConflict(Exception):
    """Exception raised when a job is to begin while another of the same run is at work."""


@dataclass(frozen=True)
class ShellCommand:
    """Value object with a command of ``probescore``: what follows its name on the command line, and, if what it prints is the result, the
    file into which that goes.
    """

    arguments: tuple[str, ...]
    prints_to: Path | None = None

    def __str__(self) -> str:
        shown = shlex.join(["probescore", *self.arguments])
        return shown if self.prints_to is None else f"{shown} > {shlex.quote(str(self.prints_to))}"


@dataclass(frozen=True)
class FileChange:
    """Value object with a change of files that is no command of ours: what one would type, and what does it."""

    shown: str
    change: Callable[[], None]

    def __str__(self) -> str:
        return self.shown


JobStep = Union[ShellCommand, FileChange]


@dataclass
class Job:
    """One repair at work, or done.

    Attributes:
        job: its name.
        run: the run that it is of.
        step: which repair it is.
        steps: its commands.
        state: ``"running"``, ``"done"`` or ``"failed"``.
        output: what the commands printed, the end of it if it is long.
        result: what came out.
    """

    job: str
    run: str
    step: str
    steps: Sequence[JobStep]
    state: str = "running"
    output: str = ""
    result: dict[str, Any] | None = None
    process: subprocess.Popen[str] | None = field(default=None, repr=False)

    def shown(self, *, whole: bool = True) -> dict[str, Any]:
        """Returns the job as a page shows it."""
        facts = {"job": self.job, "step": self.step, "state": self.state, "command": "\n".join(map(str, self.steps))}
        return facts | ({"output": self.output, "result": self.result} if whole else {})


class Jobs:
    """Runs jobs, one of each run at a time."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._ends = False

    def begin(self, run: str, step: str, steps: Sequence[JobStep], result: Callable[[], dict[str, Any]]) -> Job:
        """Begins a job.

        Args:
            run: the run that it is of.
            step: which repair it is.
            steps: its commands, each of which begins when the one before has ended well.
            result: what says what came out, once all have.

        Raises:
            JobConflict: another job of the run is at work.
        """
        with self._lock:
            if any(job.run == run and job.state == "running" for job in self._jobs.values()):
                raise JobConflict("repair: another step of this run is at work; wait until it has ended")
            job = Job(uuid.uuid4().hex[:12], run, step, steps)
            self._jobs[job.job] = job
            while len(self._jobs) > _KEPT_JOBS:
                self._jobs.pop(next(iter(self._jobs)))
        threading.Thread(target=self._work, args=(job, result), daemon=True).start()
        return job

    def found(self, job: str) -> Job:
        """Returns a job by its name.

        Raises:
            KeyError: there is no such job.
        """
        if job not in self._jobs:
            raise KeyError(f"job: {job[:40]!r}; there is no such job, or it was of a process that has ended")
        return self._jobs[job]

    def of_run(self, run: str) -> list[Job]:
        """Returns the jobs of a run, the last first."""
        return [job for job in reversed(self._jobs.values()) if job.run == run]

    def close(self) -> None:
        """Ends the jobs that are at work."""
        self._ends = True
        for job in self._jobs.values():
            if job.process is not None and job.process.poll() is None:
                job.process.terminate()

    def _work(self, job: Job, result: Callable[[], dict[str, Any]]) -> None:
        try:
            for step in job.steps:
                job.output += f"$ {step}\n"
                if isinstance(step, FileChange):
                    step.change()
                elif code := self._ran(job, step):
                    job.output += f"exit code {code}\n"
                    job.state = "failed"
                    return
            job.result = result()
            job.state = "done"
        except (OSError, ValueError, KeyError) as error:
            job.output += f"{error}\n"
            job.state = "failed"

    def _ran(self, job: Job, command: ShellCommand) -> int:
        started = [sys.executable, "-m", "probescore_server.cli", *command.arguments]
        environment: Mapping[str, str] = {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120"}
        process = subprocess.Popen(  # noqa: S603 - commands of ours, without a shell
            started,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if command.prints_to else subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        )
        job.process = process
        if self._ends:
            process.terminate()
        if command.prints_to is not None:
            printed, said = process.communicate()
            command.prints_to.write_text(printed)
            job.output += said
            return process.returncode
        assert process.stdout is not None  # noqa: S101 - it is piped
        for line in process.stdout:
            job.output = (job.output + line)[-_MOST_OUTPUT:]
        return process.wait()
