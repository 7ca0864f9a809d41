"""Determines which training run a process belongs to, as which of its ranks, and by which launch of the run it was started."""

from __future__ import annotations

import os
import socket
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

VARIABLE = "PROBESCORE_JOB"
LAUNCH = "PROBESCORE_LAUNCH"
_LAUNCHER_VARIABLES = ("SLURM_JOB_ID", "RAY_JOB_ID", "TORCHELASTIC_RUN_ID")
_UNNAMED = {"", "none"}


def job_from_environment(environment: Mapping[str, str] = os.environ) -> str:
    """Returns a name that is the same on every rank of a training run: the value of ``PROBESCORE_JOB``, or the name that Slurm, Ray or
    torchrun give the run; "" if the environment contains no name.
    """
    if named := environment.get(VARIABLE, ""):
        return named
    for variable in _LAUNCHER_VARIABLES:
        if (value := environment.get(variable, "")) not in _UNNAMED:
            return f"{variable.partition('_')[0].lower()}-{value}"
    address, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    return f"torch-{address}-{port}" if address and port else ""


@dataclass(frozen=True)
class LaunchedProcess:
    """A process of a training run as its launcher describes it.

    Attributes:
        rank: number of the process among those of the run.
        world_size: number of the run's processes.
        launch: name of the launch, equal for all processes that were started together, and another one each time that the run is started;
            "" if there are several processes and nobody knows.
    """

    rank: int
    world_size: int
    launch: str


def process_from_environment(environment: Mapping[str, str] = os.environ) -> LaunchedProcess:
    """Returns the rank of this process and the name of its launch, from ``PROBESCORE_LAUNCH`` and the variables that torchrun, accelerate,
    Slurm and Ray set.

    A run of one process has a launch of its own. Processes that torchrun or accelerate have started on one machine, of which the user need
    not name the run, have the launcher's process id.
    """
    rank, world_size = (_count(environment, *names) for names in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS")))
    rank, world_size = (rank, world_size) if 0 <= rank < world_size else (0, 1)
    return LaunchedProcess(rank, world_size, _launch(environment, world_size))


def _launch(environment: Mapping[str, str], world_size: int) -> str:
    def joined(*variables: str) -> str:
        return "-".join(environment.get(variable, "") for variable in variables)

    if named := environment.get(LAUNCH, ""):
        return named
    if of_ray := _ray_job():
        return of_ray
    if "SLURM_JOB_ID" in environment and world_size > 1:
        return "slurm-" + joined("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    if "TORCHELASTIC_RUN_ID" in environment and environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE"):
        return f"{socket.gethostname()}-{os.getppid()}-" + joined("TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    if environment.get("TORCHELASTIC_RUN_ID", "") not in _UNNAMED:
        return "torchelastic-" + joined("TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    return "" if world_size > 1 else uuid.uuid4().hex


def _ray_job() -> str:
    """Returns the name of the Ray session and job that a worker process belongs to; "" elsewhere. The environment of a worker that was
    started before its job was known does not say it.
    """
    ray = sys.modules.get("ray")
    session = next((given.partition("=")[2] for given in sys.argv if given.startswith("--session-name=")), "")
    return f"ray-{session}-{ray.get_runtime_context().get_job_id()}" if ray is not None and session else ""


def _count(environment: Mapping[str, str], *variables: str) -> int:
    found = next((value for variable in variables if (value := environment.get(variable, "")).isdecimal()), "-1")
    return int(found)
