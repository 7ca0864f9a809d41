"""The reference says all that there is: every public name, command, setting, message, metric and error."""

import importlib
import re
from pathlib import Path

import pytest
import yaml

import probescore
import probescore_adapters
import probescore_audit
import probescore_probes
import probescore_server
from probescore_audit import audit_record
from probescore_audit.record import read_record
from probescore_server.cli.audit_metrics import AuditMetrics
from probescore_server.cli.serve import PANELS, default_of
from probescore_server.front.metrics import Metrics
from probescore_server.settings import ServerSettings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
KINDS = ("tutorials", "how-to", "reference", "explanation", "decisions")
PACKAGES = (probescore, probescore_server, probescore_probes, probescore_audit, probescore_adapters)


@pytest.fixture(scope="module")
def site():
    """The module that fills the site's pages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS / "site")
        return importlib.import_module("hooks")


@pytest.fixture(scope="module")
def generated(site):
    """What each generator writes, by its name on the page."""
    return {name: write() for name, write in site.GENERATORS.items()}


def pages():
    return sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def entries(nav):
    for entry in nav:
        target = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from entries(target) if isinstance(target, list) else [target]


# the file names Python objects that only mkdocs may make
class Navigation(yaml.SafeLoader):
    pass


Navigation.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def test_each_page_is_of_one_kind_and_in_the_navigation_once():
    configuration = yaml.load((ROOT / "mkdocs.yml").read_text(), Navigation)  # noqa: S506
    assert sorted(entries(configuration["nav"])) == pages()
    for page in pages():
        assert page == "index.md" or page.split("/")[0] in KINDS, page


def test_each_kind_has_a_tab_of_its_own():
    configuration = yaml.load((ROOT / "mkdocs.yml").read_text(), Navigation)  # noqa: S506
    for tab in configuration["nav"][1:]:
        assert len({page.split("/")[0] for page in entries([tab])}) == 1, tab


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_each_public_name_is_in_the_reference_of_python_once(package):
    shown = [name for page in (REFERENCE / "api").glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
    assert len(shown) == len(set(shown))
    assert {f"{package.__name__}.{name}" for name in package.__all__} <= set(shown)


def test_what_is_generated_has_its_place_on_a_page(generated):
    places = [name for page in REFERENCE.glob("*.md") for name in re.findall(r"<!-- generated: (.+) -->", page.read_text())]
    assert sorted(places) == sorted(generated)


def test_each_command_is_shown_with_every_option(site, generated):
    sections = dict(re.findall(r"^## (probescore .+?)\n(.*?)(?=^## |\Z)", generated["command line"], re.MULTILINE | re.DOTALL))
    commands = dict(site.command_line.commands())
    assert list(sections) == list(commands)
    for path, command in commands.items():
        for parameter in command.params:
            if not parameter.hidden:
                assert all(name in sections[path] for name in (*parameter.opts, *parameter.secondary_opts)), (path, parameter.name)


def test_a_default_of_the_command_line_is_shown(generated):
    assert re.search(r"--address ADDRESS` \|.*default: localhost:50051", generated["command line"])
    assert re.search(r"--port NUMBER` \|.*\[PROBESCORE\\_PORT, default: 50051\\\]", generated["command line"])


def test_every_setting_has_its_place_in_the_help():
    assert sorted(name for names in PANELS.values() for name in names) == sorted(ServerSettings.model_fields)


@pytest.mark.parametrize("name", ServerSettings.model_fields)
def test_each_setting_is_shown_with_flag_variable_default_and_description(generated, name):
    field = ServerSettings.model_fields[name]
    flag = "--" + name.replace("_", "-")
    (row,) = (row for row in generated["settings"].splitlines() if f"**`{name}`**" in row)
    assert f"`{flag}`" in row
    assert f"`PROBESCORE_{name.upper()}`" in row
    assert f" | {default_of(field)} | " in row
    assert field.description in row.replace("\\", "")
    bounds = [getattr(bound, name) for bound in field.metadata for name in ("ge", "le") if hasattr(bound, name)]
    assert all(f"{bound:,}" in row for bound in bounds)


def test_each_part_of_the_contract_is_shown_with_its_comment(site, generated):
    text = generated["contract"]
    for file in site.contract.FILES:
        for service in file.services_by_name.values():
            assert all(f"| `{method.name}` | " in text for method in service.methods)
        for message in file.message_types_by_name.values():
            assert f"### {message.name}\n" in text
            for field in message.fields:
                assert re.search(rf"^\| `{field.name}`&nbsp;=&nbsp;{field.number} \| .+ \| \S.* \|$", text, re.MULTILINE), field.full_name
        for enum in file.enum_types_by_name.values():
            for value in enum.values:
                assert re.search(rf"^\| `{value.name}`&nbsp;=&nbsp;{value.number} \| \S.* \|$", text, re.MULTILINE), value.name


def test_every_file_of_the_contract_is_shown(site):
    assert {file.name for file in site.contract.FILES} == {
        path.relative_to(ROOT / "proto").as_posix() for path in (ROOT / "proto").rglob("*.proto")
    }


def test_every_metric_is_in_the_table_and_nothing_else():
    audit = AuditMetrics()
    audit.update(audit_record(read_record(ROOT / "examples/audit/changed")))
    families = [*Metrics().registry.collect(), *audit.collect()]
    shown = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    rows = [line.split("|")[1] for line in (REFERENCE / "metrics.md").read_text().splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {name for name in shown if not name.startswith("process_")} == documented
