"""Breaks the code, one listed way at a time, and checks that a test notices.

    python tests/mutations/run.py [PART OF A PROMISE …]

Each mutation of ``mutations.toml`` is applied to a copy of the packages, and the tests that it names are run against the copy. A mutation
is killed when one of them fails. Exits with 1 if one survives, or cannot be applied.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("client", "server", "probes", "trainer_adapters")
TESTS_FAILED = 1  # pytest's exit code; any other than this and 0 means that the tests did not run
TIMEOUT_SECONDS = 600
TEST_SECONDS = (
    120  # of one test; where a mutation makes one wait for ever, it is killed then. The code as it is passes with the same limit.
)


@dataclass(frozen=True)
class Mutation:
    """One way to break the code.

    Attributes:
        promise: what no longer holds.
        file: the mutated file, relative to the repository.
        old, new: a text that is found exactly once in it, and what takes its place.
        tests: pytest nodes, of which at least one must fail.
    """

    promise: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def module(self) -> str:
        """Dotted name of the mutated module."""
        return ".".join(Path(self.file).with_suffix("").parts[1:]).removesuffix(".__init__")

    def apply(self, root: Path) -> None:
        """Mutate the copy under ``root``; raises ``ValueError`` unless the old text is found exactly once."""
        path = root / self.file
        source = path.read_text()
        if (count := source.count(self.old)) != 1:
            raise ValueError(f"{self.file}: the old text of {self.promise!r} is found {count} times, expected once")
        path.write_text(source.replace(self.old, self.new))


def read_mutations() -> list[Mutation]:
    """All mutations of ``mutations.toml``."""
    entries = tomllib.loads(Path(__file__).with_name("mutations.toml").read_text())["mutation"]
    return [Mutation(**(entry | {"tests": tuple(entry["tests"])})) for entry in entries]


def outcome(mutation: Mutation) -> tuple[str, str]:
    """``killed``, ``survived`` or ``error``, and what was said."""
    with tempfile.TemporaryDirectory(prefix="probescore-mutation-") as directory:
        copy = Path(directory)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        try:
            mutation.apply(copy)
        except (ValueError, OSError) as error:
            return "error", str(error)
        paths = [str(copy / package) for package in PACKAGES] + os.environ.get("PYTHONPATH", "").split(os.pathsep)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
        if problem := _not_imported(mutation, copy, environment):
            return "error", problem
        code, said = _run_tests(mutation.tests, environment)
        return {0: "survived", TESTS_FAILED: "killed"}.get(code, "error"), said


def _run_tests(tests: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Pytest's exit code, and the end of what it said."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=line"]
    command += ["-o", f"timeout={TEST_SECONDS}", *tests]
    try:
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return -1, f"the tests did not end within {TIMEOUT_SECONDS} s"
    return run.returncode, "\n".join((run.stdout + run.stderr).strip().splitlines()[-15:])


def _not_imported(mutation: Mutation, copy: Path, environment: Mapping[str, str]) -> str:
    """What is wrong if Python would import another file than the mutated one; empty if nothing is."""
    code = "import importlib.util, sys; print(importlib.util.find_spec(sys.argv[1]).origin)"
    run = subprocess.run([sys.executable, "-c", code, mutation.module], env=environment, capture_output=True, text=True)
    imported = run.stdout.strip()
    if run.returncode != 0:
        return f"the mutated package cannot be imported: {run.stderr.strip().splitlines()[-1]}"
    return "" if imported == str(copy / mutation.file) else f"Python imports {imported} instead of the mutated copy"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("promise", nargs="*", help="run only the mutations whose promise contains one of these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutations at a time")
    options = parser.parse_args(arguments)
    chosen = [m for m in read_mutations() if not options.promise or any(part in m.promise for part in options.promise)]
    began = time.monotonic()
    code, said = _run_tests(sorted({test for mutation in chosen for test in mutation.tests}), os.environ)
    if code != 0:
        print(f"the tests do not pass on the code as it is:\n{said}")
        return 1
    failed = 0
    with ThreadPoolExecutor(options.jobs) as threads:
        for mutation, (result, said) in zip(chosen, threads.map(outcome, chosen), strict=True):
            print(f"{result:9} {mutation.promise}  ({mutation.file})", flush=True)
            if result != "killed":
                failed += 1
                print(said, flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} mutations killed in {time.monotonic() - began:.0f} s")
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
