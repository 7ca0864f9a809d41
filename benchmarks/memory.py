"""Resident memory of processes, as Linux counts it, and of a CUDA device."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def resident_bytes(pids: Iterable[int]) -> int:
    """Now, of all of them."""
    return sum(_status_bytes(pid, "VmRSS") for pid in pids)


def peak_bytes(pids: Iterable[int]) -> int:
    """The sum of each one's largest since ``reset_peak``."""
    return sum(_status_bytes(pid, "VmHWM") for pid in pids)


def reset_peak(pids: Iterable[int]) -> bool:
    """Starts a new peak; False where that is not permitted, so that peaks include the loading of the model."""
    try:
        for pid in pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(pid: int, name: str) -> int:
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
