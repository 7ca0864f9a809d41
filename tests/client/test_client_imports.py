"""What importing the client costs, seen from a fresh process."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import probescore

HEAVY = ("torch", "transformers", "tokenizers", "onnx", "onnxruntime", "typer", "rich", "pydantic", "sklearn", "yaml", "probescore_server")


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize(
    "statement", ["import probescore", "from probescore import *", "from probescore import ProbeClient, AsyncProbeClient"]
)
def test_importing_the_client_loads_nothing_heavy(statement: str, record_property: Any) -> None:
    assert modules_after(statement).isdisjoint(HEAVY)

    timed = subprocess.run([sys.executable, "-X", "importtime", "-c", statement], check=True, capture_output=True, text=True).stderr
    record_property("import_microseconds", timed.splitlines()[-1].split("|")[1].strip())


def test_the_value_types_do_not_load_grpc() -> None:
    assert "grpc" not in modules_after("import probescore.types")


def test_every_public_name_is_there() -> None:
    for name in probescore.__all__:
        assert getattr(probescore, name).__name__ == name
    assert dir(probescore) == sorted(probescore.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Client'"):
        _ = probescore.Client
