"""``probescore healthcheck``: an exit code, and where to look without being told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from running_server import RunningServer, start_server
from test_app import without

from probescore_server.cli.healthcheck import find_problem, own_address
from probescore_server.settings import ServerSettings

NOBODY = "127.0.0.1:1"


def test_a_server_that_serves_is_healthy_and_nothing_is_said(probescore, served: RunningServer):
    ran = probescore("healthcheck", "--address", served.address)

    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_a_service_is_asked_for_by_name(probescore, served: RunningServer):
    assert probescore("healthcheck", "-a", served.address, "--service", "probescore.v1.ScoringService").returncode == 0


def test_a_service_that_there_is_not_is_unhealthy(probescore, served: RunningServer):
    ran = probescore("healthcheck", "-a", served.address, "--service", "probescore.v1.Nobody")

    assert (ran.returncode, ran.stderr) == (1, f"probescore: {served.address}: NOT_FOUND\n")


def test_a_server_that_still_loads_is_unhealthy(probescore, model: Path):
    with start_server(model, [], wait=False) as loading:
        # the worker takes seconds to import torch, the answer comes at once
        assert find_problem(loading.address, "", 10) == f"{loading.address}: NOT_SERVING"
        # started without probes, it says so before anybody asks
        assert loading.wait_for("no probes")["consequence"] == "every request to score is refused"


def test_where_nobody_listens_one_line_says_so(probescore):
    ran = probescore("healthcheck", "--address", NOBODY)

    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (1, "", 1)
    assert ran.stderr.startswith(f"probescore: {NOBODY}: UNAVAILABLE")


def test_of_several_servers_all_must_serve(probescore, served: RunningServer):
    ran = probescore("healthcheck", "--address", f"{served.address},{NOBODY}")

    assert ran.returncode == 1
    assert ran.stderr.startswith(f"probescore: {NOBODY}: UNAVAILABLE")


def test_the_address_may_stand_alone_as_in_older_container_files(probescore, served: RunningServer):
    assert probescore("healthcheck", served.address, PROBESCORE_ADDRESS=NOBODY).returncode == 0


def test_a_proxy_is_not_asked(probescore, served: RunningServer):
    ran = probescore("healthcheck", served.address, http_proxy=f"http://{NOBODY}", no_proxy="")

    assert ran.returncode == 0


def test_the_environment_of_the_server_says_where_it_is(probescore, served: RunningServer):
    host, _, port = served.address.rpartition(":")

    assert probescore("healthcheck", PROBESCORE_HOST=host, PROBESCORE_PORT=port).returncode == 0


@pytest.mark.parametrize(
    ("environment", "address"),
    [
        ({"PROBESCORE_PORT": "1"}, "127.0.0.1:1"),
        ({"PROBESCORE_HOST": "0.0.0.0"}, "127.0.0.1:50051"),  # noqa: S104
        ({"PROBESCORE_HOST": "::"}, "localhost:50051"),
        ({"PROBESCORE_HOST": "[::]"}, "localhost:50051"),
        ({"PROBESCORE_HOST": "10.0.0.1", "PROBESCORE_PORT": ""}, "10.0.0.1:50051"),
        ({"PROBESCORE_HOST": "fd00::1"}, "[fd00::1]:50051"),
        ({"PROBESCORE_UNIX_SOCKET": "/run/probescore.sock", "PROBESCORE_PORT": "1"}, "unix:/run/probescore.sock"),
    ],
)
def test_a_server_is_reached_where_it_listens(environment, address):
    assert own_address(environment) == address


def test_without_a_word_it_is_the_default_of_the_server(monkeypatch):
    for name in ("HOST", "PORT", "UNIX_SOCKET"):
        monkeypatch.delenv(f"PROBESCORE_{name}", raising=False)

    assert own_address({}) == ServerSettings(model="x").address


def test_it_imports_no_more_than_it_needs():
    code = """
import sys
sys.argv = ["probescore", "healthcheck", "127.0.0.1:1"]
from probescore_server.cli import main
try:
    main()
except SystemExit:
    print(sorted({"torch", "numpy", "probescore"} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert ran.stdout == "[]\n"


def test_without_the_server_it_says_what_to_install():
    ran = without({"grpc_health"}, "healthcheck")

    assert (ran.returncode, ran.stderr) == (1, "probescore: healthcheck needs grpc_health: pip install 'probescore[server]'\n")
