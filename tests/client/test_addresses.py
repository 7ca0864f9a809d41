"""Addresses, and what a channel is made with."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from probescore import ProbeClient
from probescore._channel import SERVICE_CONFIG, Addresses, channel_options
from probescore._sync import _client_with


@pytest.mark.parametrize(
    ("written", "target"),
    [
        ("localhost:50051", "dns:///localhost:50051"),
        ("10.0.0.1:50051", "dns:///10.0.0.1:50051"),
        ("[::1]:50051", "dns:///[::1]:50051"),
        ("dns:///scoring.default.svc:50051", "dns:///scoring.default.svc:50051"),
        ("unix:/run/probescore.sock", "unix:/run/probescore.sock"),
        ("unix:///run/probescore.sock", "unix:///run/probescore.sock"),
        ("ipv4:10.0.0.1:1,10.0.0.2:1", "ipv4:10.0.0.1:1,10.0.0.2:1"),
        (["localhost:50051"], "dns:///localhost:50051"),
        (["127.0.0.1:1", "127.0.0.2:2"], "ipv4:127.0.0.1:1,127.0.0.2:2"),
        (["[::1]:1", "[::2]:2"], "ipv6:[::1]:1,[::2]:2"),
    ],
)
def test_an_address_is_a_grpc_target(written: Any, target: str) -> None:
    assert Addresses.of(written).target() == target


def test_names_in_a_list_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"one": ["10.0.0.1", "10.0.0.9"], "two": ["fe80::2", "10.0.0.2"]}

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        family = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(family[":" in found], socket.SOCK_STREAM, 6, "", (found, port)) for found in known[host]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)

    assert Addresses.of(["one:1", "two:2"]).target() == "ipv4:10.0.0.1:1,10.0.0.2:2"


def test_a_list_without_a_common_family_is_refused() -> None:
    with pytest.raises(ValueError, match="have neither IPv4 nor IPv6 in common"):
        Addresses.of(["127.0.0.1:1", "[::1]:2"]).target()


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ([], "no address"),
        ("", "address '' is not 'host:port', 'dns:///host:port' or 'unix:/path'"),
        ("localhost", "address 'localhost' is not 'host:port'"),
        ("localhost:", "is not 'host:port'"),
        (":50051", "is not 'host:port'"),
        ("localhost:http", "is not 'host:port'"),
        ("http://localhost:50051", "is not 'host:port'"),
        ("::1:50051", "is not 'host:port'"),
        ("a:1,b:2", "is not 'host:port'"),
        ("localhost:0", "port 0 is not between 1 and 65535"),
        ("localhost:65536", "port 65536 is not between 1 and 65535"),
        (["localhost:1", "unix:/socket"], "address 'unix:/socket' is not 'host:port'$"),
        (["localhost:1", "dns:///b:2"], "address 'dns:///b:2' is not 'host:port'$"),
    ],
)
def test_what_is_no_address_is_refused_at_once(written: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ProbeClient(written)


def looks_up(monkeypatch: pytest.MonkeyPatch, *found: str) -> list[tuple[str, int]]:
    """Lets every name have these addresses, and returns what is looked up."""
    asked: list[tuple[str, int]] = []

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        asked.append((host, port))
        families = [(socket.AF_INET6 if ":" in each else socket.AF_INET, each) for each in found]
        return [(family, socket.SOCK_STREAM, 6, "", (each, port)) for family, each in families]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


@pytest.mark.parametrize(
    ("written", "found", "servers"),
    [
        ("dns:///scoring.svc:50051", ["10.0.0.1", "10.0.0.2", "10.0.0.1"], ["10.0.0.1:50051", "10.0.0.2:50051"]),
        ("scoring.svc:50051", ["10.0.0.1", "10.0.0.2"], ["10.0.0.1:50051", "10.0.0.2:50051"]),
        ("dns:scoring.svc", ["10.0.0.1", "10.0.0.2"], ["10.0.0.1:443", "10.0.0.2:443"]),
        # both families are the same servers
        ("scoring.svc:1", ["10.0.0.1", "fe80::1", "10.0.0.2", "fe80::2"], ["10.0.0.1:1", "10.0.0.2:1"]),
        ("scoring.svc:1", ["fe80::1", "fe80::2"], ["[fe80::1]:1", "[fe80::2]:1"]),
        ("ipv4:10.0.0.1:1,10.0.0.2:2", [], ["10.0.0.1:1", "10.0.0.2:2"]),
        (["one:1", "two:2"], ["10.0.0.1"], ["10.0.0.1:1", "10.0.0.1:2"]),
        # a single server is the client's own connection
        ("localhost:1", ["::1", "127.0.0.1"], ["localhost:1"]),
        ("dns:///scoring.svc:50051", ["10.0.0.1"], ["dns:///scoring.svc:50051"]),
        ("unix:/run/probescore.sock", [], ["unix:/run/probescore.sock"]),
        ("unix-abstract:probescore", [], ["unix-abstract:probescore"]),
    ],
)
def test_each_server_of_an_address_is_found(monkeypatch: pytest.MonkeyPatch, written: Any, found: list[str], servers: list[str]) -> None:
    looks_up(monkeypatch, *found)
    parts = Addresses.of(written).each()

    assert [part.written[0] for part in parts] == servers
    for part in parts if len(parts) > 1 else ():
        assert part.target() == f"dns:///{part.written[0]}"
        assert part.authority == part.one_of != ""
        assert part.proxy is None


def test_the_servers_of_a_name_that_only_grpc_can_look_up_cannot_be_told() -> None:
    for written in ("xds:///scoring", "dns://10.0.0.53/scoring:50051"):
        with pytest.raises(ValueError, match="cannot be told apart"):
            Addresses.of(written).each()


def test_behind_a_proxy_there_is_one_server(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = looks_up(monkeypatch, "10.0.0.1", "10.0.0.2")
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://proxy:3128")

    addresses = Addresses.of("scoring.svc:50051")
    assert addresses.each() == (addresses,)
    assert asked == []


def test_the_servers_of_a_name_that_goes_direct_go_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    looks_up(monkeypatch, "10.0.0.1", "10.0.0.2")
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "scoring.svc")

    for settings in ProbeClient("scoring.svc:50051")._servers():
        options = dict(_client_with(settings)._channel_options(settings.addresses.target()))
        assert options["grpc.enable_http_proxy"] == 0
        assert options["grpc.default_authority"] == "scoring.svc:50051"


def test_a_certificate_is_checked_against_the_name_that_the_user_gave() -> None:
    assert Addresses.of(["scoring-0:1", "scoring-1:1"]).authority == "scoring-0:1"
    assert Addresses.of("scoring:1").authority is None


def test_the_service_config_balances_and_leaves_retries_to_the_loop() -> None:
    options = dict(channel_options(restart_budget=100, target="dns:///a:1"))
    assert json.loads(str(options["grpc.service_config"])) == SERVICE_CONFIG == {"loadBalancingConfig": [{"round_robin": {}}]}
    assert options["grpc.enable_retries"] == 0


@pytest.mark.parametrize(("budget", "seconds"), [(0, 20), (1, 2), (40, 2), (120, 6), (3600, 20)])
def test_a_connection_may_take_a_twentieth_of_the_budget(budget: float, seconds: int) -> None:
    assert dict(channel_options(budget, "dns:///a:1"))["grpc.min_reconnect_backoff_ms"] == 1000 * seconds
