"""What importing the audit costs and needs, seen from a fresh process."""

from __future__ import annotations

import subprocess
import sys

import pytest

import probescore_audit

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "pydantic", "sklearn", "grpc", "probescore_server", "probescore_probes")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def modules_after(statement: str) -> set[str]:
    return set(run(f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))").split())


@pytest.mark.parametrize("statement", ["import probescore_audit", "from probescore_audit import *"])
def test_importing_the_audit_loads_nothing_heavy(statement):
    assert modules_after(statement).isdisjoint(HEAVY)


def test_the_value_types_do_not_load_scipy():
    assert "scipy" not in modules_after("from probescore_audit import Auroc, CalibratedThreshold")


def test_writing_a_probe_loads_the_value_types_alone():
    # A serving image has what writes a probe file, and no scipy.
    loaded = {name for name in modules_after("import probescore_probes.writing") if name.startswith("probescore_audit")}
    assert loaded == {"probescore_audit", "probescore_audit.arguments", "probescore_audit.estimates"}


def test_the_audit_works_where_nothing_heavy_is_installed():
    found = run(f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
try:
    import torch
except ModuleNotFoundError:
    print("no torch")
from probescore_audit import calibrate, evaluate_auroc
print(calibrate(range(100), false_positive_rate=0.05, dataset="d").threshold)
print(evaluate_auroc([2.0], [1.0], dataset="d").value)
""")
    assert found.splitlines() == ["no torch", "94.5", "1.0"]


def test_every_public_name_is_there():
    for name in probescore_audit.__all__:
        assert getattr(probescore_audit, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'audit'"):
        _ = probescore_audit.audit
