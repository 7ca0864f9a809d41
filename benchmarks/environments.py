"""Environments of their own for packages whose pins may conflict with ours."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.model import FOLDER
from benchmarks.process import VariantFailed


def python_with(package: str, folder: Path = FOLDER) -> str:
    """The Python of an environment that has a package, made if it is not there. Its torch is ours: threads and kernels are the same.

    Raises:
        VariantFailed: the package cannot be installed beside our torch.
    """
    directory = folder.resolve() / f"env-{package}"
    python, done = directory / "bin" / "python", directory / "installed"
    if not done.exists():
        venv.create(directory, clear=True, with_pip=True)
        torch = f"torch=={importlib.metadata.version('torch').partition('+')[0]}"
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package, torch]
        ran = subprocess.run(pip, capture_output=True, text=True, check=False)
        if ran.returncode:
            errors = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")]
            raise VariantFailed(f"pip install {package} {torch}: {errors[-1] if errors else ran.stderr.strip()[-200:]}")
        done.write_text(sys.version)
    return str(python)
