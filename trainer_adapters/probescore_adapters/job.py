"""Determines the name of the training run that a process belongs to: all ranks of one run share one turn at the server."""

from __future__ import annotations

import os
from collections.abc import Mapping

VARIABLE = "PROBESCORE_JOB"
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
