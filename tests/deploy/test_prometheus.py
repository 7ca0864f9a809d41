"""A real Prometheus scrapes a real server under load, and everything that looks at it finds something."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import create_server
from typing import Any

import numpy as np
import pytest
import yaml
from models import BOS, VOCAB_SIZE
from running_server import RunningServer, start_server
from steady_load import SteadyLoad

from probescore import ProbeClient, RolloutGroup

ROOT = Path(__file__).parents[2]
RULES = sorted((ROOT / "docker/prometheus/rules").glob("*.yaml"))
DASHBOARDS = sorted((ROOT / "docker/grafana/dashboards").glob("*.json"))
VARIABLES = {"$instance": ".*", "$probe": ".*", "$run": ".*", "$reading": ".*", "$__rate_interval": "1m"}


@dataclass
class Prometheus:
    """One that runs."""

    address: str

    def ask(self, path: str, **parameters: str) -> Any:
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]

    def query(self, expr: str) -> list[float]:
        """The values of an instant query, without NaN."""
        values = [float(sample["value"][1]) for sample in self.ask("query", query=expr)["result"]]
        return [value for value in values if value == value]


def eventually(holds: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.5)


def groups() -> list[RolloutGroup]:
    random = np.random.default_rng(1)
    return [
        RolloutGroup([BOS, *random.integers(4, VOCAB_SIZE, 8)], [random.integers(4, VOCAB_SIZE, 12) for _ in range(4)]) for _ in range(3)
    ]


@pytest.fixture(scope="module")
def served(model: Path, probe_file: Path) -> Iterator[RunningServer]:
    with start_server(model, [probe_file]) as server:
        yield server


@pytest.fixture(scope="module")
def audited() -> Iterator[str]:
    """The address of the metrics of an audit of a run that is well."""
    command = [
        sys.executable,
        "-m",
        "probescore_server.cli",
        "audit",
        str(ROOT / "examples/audit/changed"),
        "--follow",
        "--metrics-port",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = re.search(r"metrics are at http://(\S+)/metrics", process.stderr.readline())
            assert said is not None
            yield said[1]
        finally:
            process.terminate()


@contextmanager
def running_prometheus(server: RunningServer, directory: Path, audit: str = "") -> Iterator[Prometheus]:
    """With our rules; scrapes and evaluates every second, so that nobody waits."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(path) for path in RULES],
        "scrape_configs": [
            {"job_name": "probescore", "static_configs": [{"targets": [server.metrics_address]}]},
            {"job_name": "audit", "static_configs": [{"targets": [audit] if audit else []}]},
        ],
    }
    (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
    with closing(create_server(("127.0.0.1", 0))) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [f"--config.file={directory}/prometheus.yaml", f"--storage.tsdb.path={directory}/data", f"--web.listen-address={address}"]
    with (directory / "log").open("wb") as log, subprocess.Popen(["prometheus", *flags], stdout=log, stderr=log) as process:
        try:
            prometheus = Prometheus(address)
            eventually(lambda: _is_up(prometheus))
            yield prometheus
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def prometheus(served: RunningServer, audited: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with running_prometheus(served, tmp_path_factory.mktemp("prometheus"), audited) as prometheus:
        yield prometheus


@pytest.fixture(scope="module")
def under_load(served: RunningServer, prometheus: Prometheus) -> Iterator[Prometheus]:
    with ProbeClient(served.address) as client, SteadyLoad(client, groups(), "direction") as load:
        load.wait_for_answers(50)
        eventually(lambda: prometheus.query("probe:probescore_probe_score:shift"))
        eventually(lambda: prometheus.query("increase(probescore_audit_audits_total[15m])"))
        eventually(lambda: prometheus.query("probescore_audit_verdict"))
        yield prometheus
    assert load.failures == []


def _is_up(prometheus: Prometheus) -> bool:
    try:
        return prometheus.query('up{job="probescore"}') == [1.0]
    except OSError:
        return False


def panels() -> list[tuple[str, str]]:
    found = []
    for panel in [panel for path in DASHBOARDS for panel in json.loads(path.read_text())["panels"]]:
        for target in panel["targets"]:
            expr = target["expr"]
            for variable, value in VARIABLES.items():
                expr = expr.replace(variable, value)
            found.append((f"{panel['title']} {target['refId']}", expr))
    return found


def rules() -> list[tuple[str, str]]:
    """Every rule; an alert's comparisons with ``bool``, so that it has a value when it does not fire, too."""
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    each = [rule for group in groups for rule in group["rules"]]
    recording = [(rule["record"], rule["expr"]) for rule in each if "record" in rule]
    return recording + [(rule["alert"], re.sub(r"\s(==|>=|<=|>|<)\s", r" \1 bool ", rule["expr"])) for rule in each if "alert" in rule]


@pytest.mark.parametrize(("panel", "expr"), panels(), ids=[name for name, _ in panels()])
def test_every_expression_of_the_dashboard_has_data(under_load: Prometheus, panel: str, expr: str) -> None:
    eventually(lambda: under_load.query(expr), 30)


@pytest.mark.parametrize(("rule", "expr"), rules(), ids=[name for name, _ in rules()])
def test_every_rule_has_data(under_load: Prometheus, rule: str, expr: str) -> None:
    eventually(lambda: under_load.query(expr), 30)


def test_no_alert_fires_at_a_server_that_is_well(under_load: Prometheus) -> None:
    assert [alert["labels"]["alertname"] for alert in under_load.ask("alerts")["alerts"] if alert["state"] == "firing"] == []


def test_every_rule_is_evaluated_without_an_error(under_load: Prometheus) -> None:
    evaluated = [rule for group in under_load.ask("rules")["groups"] for rule in group["rules"]]
    assert len(evaluated) == len(rules())
    assert {rule["health"] for rule in evaluated} == {"ok"}


def test_promtool_finds_nothing_to_say_of_the_metrics(under_load: Prometheus, served: RunningServer) -> None:
    with urllib.request.urlopen(f"http://{served.metrics_address}/metrics", timeout=30) as answer:
        assert promtool("check", "metrics", given=answer.read().decode()) == ""


def test_the_rules_do_what_their_unit_tests_say() -> None:
    assert "SUCCESS" in promtool("test", "rules", "tests/deploy/rules_test.yaml")


def test_the_rules_and_the_configuration_are_valid() -> None:
    assert "SUCCESS" in promtool("check", "config", "docker/prometheus/prometheus.yaml")


def promtool(*arguments: str, given: str = "") -> str:
    """What it says; fails if it finds a fault."""
    done = subprocess.run(["promtool", *arguments], cwd=ROOT, input=given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_alert_has_its_section_in_the_runbook() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "docs/how-to/deploy/runbook.md").read_text(), re.MULTILINE)
    alerts = [name for name, _ in rules() if name.startswith("Probescore")]
    assert [name for name in alerts if name not in headings] == []


def test_every_alert_has_a_unit_test() -> None:
    tested = (ROOT / "tests/deploy/rules_test.yaml").read_text()
    assert [name for name, _ in rules() if name.startswith("Probescore") and f"alertname: {name}\n        exp_alerts" not in tested] == []


def test_a_server_that_is_gone_raises_an_alert(model: Path, probe_file: Path, tmp_path: Path) -> None:
    def alerts(prometheus: Prometheus) -> list[tuple[str, str]]:
        return [(alert["labels"]["alertname"], alert["state"]) for alert in prometheus.ask("alerts")["alerts"]]

    with start_server(model, [probe_file]) as server, running_prometheus(server, tmp_path) as prometheus:
        server.stop()
        eventually(lambda: ("ProbescoreDown", "firing") in alerts(prometheus), 150)
