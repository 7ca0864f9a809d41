"""Which rank of a run a process is, and which launch of the run has started it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from probescore_adapters.job import process_from_environment

ELASTIC = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "rank", "world_size"),
    [
        ({}, 0, 1),
        ({"RANK": "3", "WORLD_SIZE": "8"}, 3, 8),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, 2, 4),
        ({"RANK": "8", "WORLD_SIZE": "8"}, 0, 1),
        ({"RANK": "one", "WORLD_SIZE": ""}, 0, 1),
    ],
)
def test_ranks_are_the_launchers(environment: dict[str, str], rank: int, world_size: int) -> None:
    found = process_from_environment(environment)
    assert (found.rank, found.world_size) == (rank, world_size)


def test_a_run_of_one_process_is_launched_anew_each_time() -> None:
    launches = {process_from_environment({}).launch for _ in range(3)}
    assert len(launches) == 3
    assert "" not in launches


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}, {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"}),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}, {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "1"}),
        ({**ELASTIC, "LOCAL_WORLD_SIZE": "2"}, {**ELASTIC, "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "1"}),
        ({**ELASTIC, "TORCHELASTIC_RUN_ID": "a"}, {**ELASTIC, "TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "1"}),
        ({"PROBESCORE_LAUNCH": "a"}, {"PROBESCORE_LAUNCH": "b"}),
    ],
)
def test_ranks_share_a_launch_and_a_restart_is_another(first: dict[str, str], second: dict[str, str]) -> None:
    def launches(environment: dict[str, str]) -> set[str]:
        return {process_from_environment({"RANK": str(rank), "WORLD_SIZE": "2", **environment}).launch for rank in range(2)}

    assert len(launches(first)) == len(launches(second)) == 1
    assert launches(first).isdisjoint(launches(second))
    assert "" not in launches(first)


def test_launchers_that_name_nothing_are_told_apart_by_rank() -> None:
    assert process_from_environment({"RANK": "0", "WORLD_SIZE": "2"}).launch == ""


def test_two_launchers_on_one_machine_are_two_launches() -> None:
    code = "from probescore_adapters.job import process_from_environment as p; print(p().launch)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    environment = {**os.environ, **ELASTIC, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    found = [subprocess.run([sys.executable, "-c", child], env=environment, capture_output=True, text=True).stdout for _ in range(2)]
    assert found[0] != found[1] != ""
