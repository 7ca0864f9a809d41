"""Proxies of the environment: never for this machine, and never a riddle."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from scripted_server import Refusal, Service, error_info, group, serving

from probescore import DeadlineExceededError, UnavailableError
from probescore._proxies import Proxy, goes_direct, proxy_of

VARIABLES = ["grpc_proxy", "https_proxy", "http_proxy"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*VARIABLES, "no_proxy", "no_grpc_proxy"]:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@contextmanager
def proxy(answer: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """A proxy that answers everything alike; gives its port, and what it was asked."""
    asked: list[bytes] = []
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(16)

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    asked.append(connection.recv(4096).split(b"\r\n")[0])
                    if answer:
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1], asked
        listening.shutdown(socket.SHUT_RDWR)


FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("written", ["127.0.0.1:{}", "localhost:{}", "dns:///localhost:{}", "ipv4:127.0.0.1:{}", "dns:localhost:{}"])
def test_a_server_on_this_machine_is_reached_without_the_proxy(
    client_class: Any, address: str, monkeypatch: pytest.MonkeyPatch, variable: str, written: str
) -> None:
    with proxy(FORBIDDEN) as (port, asked):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{port}")
        with client_class(written.format(address.rpartition(":")[2]), restart_budget=0) as client:
            assert client.score([group([1, 2])]).values("sum").tolist() == [3]
    assert asked == []


def test_several_servers_are_reached_without_the_proxy(client_class: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # gRPC would ask the proxy for all of them as if they were one address
    with proxy(FORBIDDEN) as (port, asked), serving(Service()) as second:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        with client_class([address, second], restart_budget=0) as client:
            assert client.score([group([1, 2])]).values("sum").tolist() == [3]
    assert asked == []


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("answer", [FORBIDDEN, b"", b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", b"nonsense\r\n\r\n"])
def test_an_error_of_the_proxy_names_its_variable(client_class: Any, monkeypatch: pytest.MonkeyPatch, variable: str, answer: bytes) -> None:
    with proxy(answer) as (port, asked):
        monkeypatch.setenv(variable, f"http://user:secret@127.0.0.1:{port}")
        with client_class("10.9.9.9:50051", timeout=10, restart_budget=0) as client:
            for call in (lambda: client.score([group([1])]), lambda: list(client.score_stream([group([1])])), client.get_server_info):
                with pytest.raises(UnavailableError, match=f"the proxy 127.0.0.1:{port} of the environment variable {variable};") as raised:
                    call()
                assert "secret" not in str(raised.value)
                assert "no_proxy" in str(raised.value)
    assert asked[0] == b"CONNECT 10.9.9.9:50051 HTTP/1.1"


def test_a_proxy_that_is_not_there_is_named(client_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxy(b"") as (port, _):
        pass
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
    named = pytest.raises(UnavailableError, match="environment variable https_proxy")
    with client_class("10.9.9.9:50051", timeout=10, restart_budget=0.5) as client, named:
        client.score([group([1])])


def test_a_proxy_that_never_answers_is_named(client_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(16)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{listening.getsockname()[1]}")
        named = pytest.raises((UnavailableError, DeadlineExceededError), match="environment variable http_proxy")
        with client_class("10.9.9.9:50051", restart_budget=0) as client, named:
            client.score([group([1])], timeout=0.5)


def test_an_error_that_the_server_explains_does_not_blame_the_proxy(
    client_class: Any, address: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.script = [Refusal(grpc.StatusCode.UNAVAILABLE, "starting", (error_info("WORKER_UNAVAILABLE"),))]
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with client_class(address, restart_budget=0) as client, pytest.raises(UnavailableError) as raised:
        client.score([group([1])])
    assert str(raised.value) == "starting"


@pytest.mark.parametrize(
    ("target", "direct"),
    [
        ("dns:///localhost:1", True),
        ("dns:///LOCALHOST.:1", True),
        ("dns:///a.localhost:1", True),
        ("dns://8.8.8.8/localhost:1", True),
        ("dns:localhost:1", True),
        ("dns:///ip6-localhost:1", True),
        ("dns:///127.0.0.1:1", True),
        ("dns:///127.8.9.1:1", True),
        ("dns:///127.1:1", True),
        ("dns:///0.0.0.0:1", True),
        ("dns:///[::1]:1", True),
        ("dns:///[::ffff:127.0.0.1]:1", True),
        ("dns:///[::]:1", True),
        ("ipv6:[::1]:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("unix:/run/socket", True),
        ("unix:///run/socket", True),
        ("unix-abstract:socket", True),
        ("ipv4:10.0.0.1:1,10.0.0.2:1", True),
        ("ipv6:[::2]:1,[::3]:1", True),
        ("dns:///localhost.example.com:1", False),
        ("dns:///notlocalhost:1", False),
        ("dns:///10.0.0.1:1", False),
        ("dns:///128.0.0.1:1", False),
        ("dns:///[fe80::1%eth0]:1", False),
        ("dns:///scoring:50051", False),
        ("dns:///scoring", False),
    ],
)
def test_what_is_on_this_machine_is_known_by_its_address(target: str, direct: bool) -> None:
    assert goes_direct(target) is direct


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"http_proxy": "http://a:1"}, Proxy("http_proxy", "a:1")),
        ({"http_proxy": "http://a:1", "https_proxy": "http://b:1"}, Proxy("https_proxy", "b:1")),
        ({"http_proxy": "http://a:1", "grpc_proxy": "http://c"}, Proxy("grpc_proxy", "c:80")),
        ({"http_proxy": "http://a:1", "grpc_proxy": ""}, None),
        ({"HTTP_PROXY": "http://a:1", "ALL_PROXY": "http://a:1"}, None),
        ({"http_proxy": "https://a:1"}, None),
        ({"http_proxy": "socks5://a:1"}, None),
        ({"http_proxy": "http://a:port"}, None),
        ({"http_proxy": "http://a:1", "no_proxy": "scoring.example.com"}, None),
        ({"http_proxy": "http://a:1", "no_proxy": "x, Example.COM"}, None),
        ({"http_proxy": "http://a:1", "no_proxy": "*"}, Proxy("http_proxy", "a:1")),
        ({"http_proxy": "http://a:1", "NO_PROXY": "example.com"}, Proxy("http_proxy", "a:1")),
        ({"http_proxy": "http://a:1", "no_proxy": "example.com", "no_grpc_proxy": "x"}, Proxy("http_proxy", "a:1")),
    ],
)
def test_the_proxy_is_the_one_that_grpc_takes(environment: dict[str, str], found: Proxy | None) -> None:
    assert proxy_of("dns:///scoring.example.com:50051", environment) == found


@pytest.mark.parametrize(("exception", "found"), [("10.0.0.0/8", False), ("11.0.0.0/8", True), ("10.9.9.9", False)])
def test_networks_are_exceptions_too(exception: str, found: bool) -> None:
    environment = {"http_proxy": "http://a:1", "no_proxy": exception}
    assert (proxy_of("dns:///10.9.9.9:50051", environment) is not None) is found
