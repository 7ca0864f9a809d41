"""Audits a training run from within its trainer, in a process of its own, so that the trainer neither waits for it nor fails with it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

# the standard library's: a trainer's process has its own way of showing logs
logger = logging.getLogger("probescore_audit")

_ESTIMATES = ("positive_rate", "recall", "false_positive_rate", "missed", "auroc", "honest_share")
_PAUSE = 0.05  # seconds between two looks at an audit that is waited for
_LEAST_PRIORITY = 10  # of the operating system's: 0 is the trainer's, 19 the lowest


class ProbeAlarm(RuntimeError):
    """Error that ends a training run whose probe raised an alarm, if ``on_alarm`` is ``"raise"``."""


class LiveAudit:
    """Audits a training run every so many steps while it trains, and logs verdicts and alarms.

    ``step`` is called once a training step and returns at once: the audit reads the run's record in another process, of low priority,
    without a GPU, of which there is never more than one. What it found is logged by a later call. If it fails or takes too long, that is a
    line in the log, and training goes on. Of several ranks the first audits.

    A verdict is logged when it changes, and a monitor's alarm once, as a warning. Alarms have a bounded chance of ever being false in the
    run, however often one looks; verdicts have none.

    Args:
        run: folder of the run's record, which a trainer writes.
        every: number of steps between two audits.
        on_alarm: ``"log"`` = a warning; ``"raise"`` = ``step`` raises ``ProbeAlarm``, which ends the run.
        timeout: seconds after which an audit is ended.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, run: Path | str, *, every: int = 10, on_alarm: Literal["log", "raise"] = "log", timeout: float = 600.0) -> None:
        if every < 1:
            raise ValueError(f"every: {every}; give the number of steps between two audits, at least 1")
        if not timeout > 0:
            raise ValueError(f"timeout: {timeout}; give the number of seconds that an audit may take")
        if on_alarm not in ("log", "raise"):
            raise ValueError(f'on_alarm: {on_alarm!r}; give "log" or "raise"')
        self._run, self._every, self._timeout = Path(run), every, timeout
        self._raises = on_alarm == "raise"
        self._is_first_rank = os.environ.get("RANK", "0") in ("", "0")
        self._last_step: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._output: tuple[IO[bytes], IO[bytes]] | None = None
        self._ends_at = 0.0
        self._closed = False
        self._metrics: dict[str, float] = {}
        self._said: set[str] = set()
        self._verdicts: dict[str, str] = {}

    @property
    def running(self) -> int | None:
        """Returns the id of the process that audits at the moment; ``None`` if there is none."""
        return None if self._process is None else self._process.pid

    def step(self, step: int) -> None:
        """Logs what an audit found that has ended, and starts one if ``every`` steps have passed since the last; returns at once.

        Args:
            step: number of the training step.

        Raises:
            ProbeAlarm: a monitor raised an alarm that was not there before, and ``on_alarm`` is ``"raise"``.
        """
        alarms = self._collect()
        if self._is_first_rank and self._process is None and not self._closed and self._is_due(step):
            self._start(step)
        if alarms and self._raises:
            raise ProbeAlarm("; ".join(alarms))

    def metrics(self) -> dict[str, float]:
        """Returns the numbers of the last audit by name, such as ``audit/cheating@1/policy/recall``, for a trainer's own logs; empty before
        the first has ended. Numbers that are not known are left out.
        """
        return dict(self._metrics)

    def finish(self) -> None:
        """Audits the run a last time, waits for what is found, for ``timeout`` seconds at most, logs it, and closes. For the end of a run:
        an alarm is logged, whatever ``on_alarm`` says.
        """
        self._wait()
        if self._is_first_rank and not self._closed:
            self._start(self._last_step or 0)
            self._wait()
        self.close()

    def close(self) -> None:
        """Ends the audit that runs, if there is one; no other starts. A second call does nothing."""
        self._closed = True
        self._end()

    def __enter__(self) -> LiveAudit:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _is_due(self, step: int) -> bool:
        if self._last_step is None or step < self._last_step:  # the first, or the run has gone back to an earlier step
            return step >= self._every
        return step - self._last_step >= self._every

    def _start(self, step: int) -> None:
        self._last_step = step
        with contextlib.ExitStack() as opened:
            try:
                answer, complaint = (opened.enter_context(tempfile.TemporaryFile()) for _ in range(2))
                self._process = subprocess.Popen(  # noqa: S603 - this Python, with a module of ours
                    [sys.executable, "-m", "probescore_audit", str(self._run)],
                    stdin=subprocess.DEVNULL,
                    stdout=answer,
                    stderr=complaint,
                    env=_environment(),
                    start_new_session=True,  # Ctrl-C is the trainer's, who ends the audit
                )
            except OSError as error:
                self._say(f"the run is not audited: its process does not start: {error.strerror}")
                return
            self._output = (answer, complaint)
            opened.pop_all()  # they stay open until the audit has ended
        self._ends_at = time.monotonic() + self._timeout
        _lower_priority(self._process.pid)

    def _collect(self) -> list[str]:
        """Takes the result of an audit that has ended, and returns the alarms that are new."""
        if self._process is None or self._output is None:
            return []
        code = self._process.poll()
        if code is None:
            if time.monotonic() > self._ends_at:
                self._end()
                self._say(f"the run is not audited: it took longer than {self._timeout:g} s")
            return []
        answer, complaint = (_read(each) for each in self._output)
        self._end()
        if code != 0:
            why = complaint.strip().splitlines()
            self._say(f"the run is not audited: {why[-1] if why and code == 2 else f'its process ended with code {code}'}")
            return []
        try:
            found = json.loads(answer)
        except ValueError:
            self._say("the run is not audited: its process did not write numbers, but something else")
            return []
        return self._take(found)

    def _take(self, found: Mapping[str, Any]) -> list[str]:
        metrics = {"audit/step": float(found["last_step"])}
        alarms = []
        for each in found["readings"]:
            name = f"{each['probe']}, {each['reading']}"
            metrics |= _metrics_of(each)
            if each["verdict"] != self._verdicts.get(name):
                self._verdicts[name] = each["verdict"]
                logger.info("step %d: %s: %s", found["last_step"], name, each["sentence"])
            for alarm in each["alarms"]:
                said = f"{name}: alarm at step {alarm['step']} of the monitor of {alarm['monitor']}. {each['next_step']}"
                if (key := f"{name} {alarm['monitor']}") not in self._said:
                    self._said.add(key)
                    alarms.append(said)
                    logger.warning("%s", said)
        self._metrics = metrics
        return alarms

    def _wait(self) -> None:
        while self._process is not None:
            self._collect()
            time.sleep(_PAUSE)

    def _end(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
        for each in self._output or ():
            each.close()
        self._process = self._output = None

    def _say(self, problem: str) -> None:
        """Logs a problem, each once: a record that cannot be audited yet stays so for many steps."""
        if problem not in self._said:
            self._said.add(problem)
            logger.warning("%s", problem)


def _environment() -> dict[str, str]:
    """Returns the trainer's environment for a process that takes no GPU and one core."""
    path = os.pathsep.join(each for each in sys.path if each)
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _lower_priority(process: int) -> None:
    if hasattr(os, "setpriority"):
        try:
            os.setpriority(os.PRIO_PROCESS, process, _LEAST_PRIORITY)
        except OSError:
            logger.debug("the audit has the trainer's priority")


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _metrics_of(each: Mapping[str, Any]) -> dict[str, float]:
    where = f"audit/{each['probe']}/{each['reading']}"
    found = {f"{where}/alarm": float(bool(each["alarms"]))}
    if each["windows"]:
        last = each["windows"][-1]
        found |= {f"{where}/{name}": last[name]["value"] for name in _ESTIMATES if last[name]["value"] is not None}
    if each["refit"] is not None:
        found[f"{where}/refit_auroc"] = each["refit"]["auroc"]["value"]
    return found
