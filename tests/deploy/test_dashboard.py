"""The Grafana dashboards are what their source says, and what Grafana's own types allow."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "docker/grafana/dashboards").glob("*.json"))
TYPES = ROOT / "build/schemas"


@pytest.fixture(params=DASHBOARDS, ids=[path.stem for path in DASHBOARDS])
def file(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture(scope="module")
def source() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboard", ROOT / "docker/grafana/dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_dashboard_has_a_source(source: ModuleType) -> None:
    assert [path.name for path in DASHBOARDS] == sorted(source.BUILT)


def test_the_json_is_what_its_source_writes(source: ModuleType, file: Path) -> None:
    assert file.read_text() == source.encode(source.BUILT[file.name]())


def test_it_comes_back_from_the_sdk_as_it_went_in(source: ModuleType, file: Path) -> None:
    register_default_plugins()
    assert source.encode(Dashboard.from_json(json.loads(file.read_text()))) == file.read_text()


def test_it_type_checks_against_grafanas_schema(file: Path) -> None:
    # an enumeration is a string in JSON, and its member in TypeScript
    literal = file.read_text().replace('"mode": "absolute"', '"mode": ThresholdsMode.Absolute')
    checked = TYPES / "dashboard.ts"
    checked.write_text(
        f"import {{ type Dashboard, ThresholdsMode }} from '@grafana/schema';\nexport const dashboard: Dashboard = {literal};\n"
    )
    options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext", "--moduleResolution", "nodenext", "--target", "es2022"]
    done = subprocess.run(["node_modules/.bin/tsc", *options, checked.name], cwd=TYPES, capture_output=True, text=True, timeout=240)
    assert done.stdout == ""
    assert done.returncode == 0


def test_it_fits_on_one_screen(file: Path) -> None:
    """A screen of 1080 pixels shows 24 units of 38 pixels below Grafana's own bars."""
    places = [panel["gridPos"] for panel in json.loads(file.read_text())["panels"]]
    assert max(place["y"] + place["h"] for place in places) <= 24
    cells = [
        (x, y) for place in places for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_grafana_is_provisioned_with_the_data_source_that_the_dashboard_offers_first() -> None:
    sources = yaml.safe_load((ROOT / "docker/grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert [(each["type"], each["isDefault"]) for each in sources] == [("prometheus", True)]
