"""What docs/reference/settings.md says of the settings is what the settings say of themselves; metrics.md beside it knows every metric."""

import re
from pathlib import Path

import pytest

from probescore_server.cli.serve import PANELS, default_of
from probescore_server.front.metrics import Metrics
from probescore_server.settings import ServerSettings

DOCS = Path(__file__).parents[2] / "docs/reference"
DOCUMENT = DOCS / "settings.md"


def row(name: str) -> str:
    field = ServerSettings.model_fields[name]
    return f"| `{name}` | {default_of(field)} | {field.description} |"


@pytest.mark.parametrize("name", ServerSettings.model_fields)
def test_a_setting_is_documented_as_it_is(name):
    assert row(name) in DOCUMENT.read_text().splitlines()


def test_every_setting_has_its_place_in_the_help():
    assert sorted(name for names in PANELS.values() for name in names) == sorted(ServerSettings.model_fields)


def test_every_metric_is_in_the_table_and_nothing_else():
    shown = {f"{family.name}_total" if family.type == "counter" else family.name for family in Metrics().registry.collect()}
    rows = [line.split("|")[1] for line in (DOCS / "metrics.md").read_text().splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {name for name in shown if not name.startswith("process_")} == documented


if __name__ == "__main__":
    for panel, names in PANELS.items():
        print(f"\n**{panel}**\n\n| setting | default | what it is |\n|---|---|---|")
        print("\n".join(map(row, names)))
