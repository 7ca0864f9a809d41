"""Addresses, and what a channel is made with."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from probescore import ProbeClient
from probescore._channel import SERVICE_CONFIG, Addresses, channel_options


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
