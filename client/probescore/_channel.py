"""Makes gRPC channels: reads addresses, sets options that go with the server's, and has connections balanced."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from probescore._proxies import Proxy, goes_direct, proxy_of

MAX_RECEIVE_BYTES = 64 * 1024 * 1024
"""Limits an answer that the client takes to so many bytes."""
KEEPALIVE_SECONDS = 60
"""Sets how often the client pings a server that has said nothing while a call is open."""
KEEPALIVE_TIMEOUT_SECONDS = 20
"""Sets after how long without an answer to a ping the connection counts as lost."""
MIN_PING_SECONDS = 30
"""Is the least time between pings that a server must allow, or it would end the connection of a client that waits."""
LOOKUP_SECONDS = 5
"""Is the least time between two look-ups of a name, which the client does when a connection ends or cannot be made."""
DEFAULT_ADDRESS = "localhost:50051"

_RECONNECT_SECONDS = (0.2, 1.0)
_CONNECT_SECONDS = (2.0, 20.0)
_CONNECT_SHARE = 0.05
_HOST_PORT = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.%]+)\]|(?P<host>[^\s:/\[\],]+)):(?P<port>\d{1,5})")
_SCHEMES = ("dns:", "unix:", "unix-abstract:", "ipv4:", "ipv6:", "xds:")

SERVICE_CONFIG: dict[str, list[dict[str, dict[str, str]]]] = {"loadBalancingConfig": [{"round_robin": {}}]}


def channel_options(restart_budget: float, target: str) -> list[tuple[str, str | int]]:
    """Returns gRPC's options for every channel of a client. What they ask of a server is ``MIN_PING_SECONDS``.

    Args:
        restart_budget: seconds that a call may go on trying; a twentieth of it, or 2 s if that is more, may go into one connection.
        target: of gRPC, to which the channel leads.
    """
    shortest, enough = _CONNECT_SECONDS
    connect = min(max(restart_budget * _CONNECT_SHARE, shortest), enough) if restart_budget else enough
    first, longest = _RECONNECT_SECONDS
    return [
        ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
        # the client's loop is the only one: below it another would keep neither its budget nor its log, and wait out any pushback
        ("grpc.enable_retries", 0),
        ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
        # gRPC's own minute would count otherwise, however short the keepalive timeout
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.enable_http_proxy", int(not goes_direct(target))),
        # in spite of its name how long a connection may take to stand
        ("grpc.min_reconnect_backoff_ms", int(connect * 1000)),
        # gRPC's own two minutes would outlast the restart that the client waits for
        ("grpc.initial_reconnect_backoff_ms", int(first * 1000)),
        ("grpc.max_reconnect_backoff_ms", int(longest * 1000)),
        # within gRPC's own half minute every server that the client knew may have been replaced
        ("grpc.dns_min_time_between_resolutions_ms", LOOKUP_SECONDS * 1000),
    ]


@dataclass(frozen=True)
class Addresses:
    """Holds the addresses of the servers that a client was given.

    One address is ``"host:port"``, ``"dns:///host:port"`` (round robin over all that the name resolves to) or ``"unix:/path"``; several
    are ``["host:port", …]``, taken in turn.

    Raises:
        ValueError: an address is none of these.
    """

    written: tuple[str, ...]

    @classmethod
    def of(cls, addresses: str | Sequence[str]) -> Addresses:
        """Makes addresses of what a user gives: one string, or several."""
        return cls((addresses,) if isinstance(addresses, str) else tuple(addresses))

    def __post_init__(self) -> None:
        if not self.written:
            raise ValueError("no address: give 'host:port', 'dns:///host:port', 'unix:/path' or a list of 'host:port'")
        for address in self.written:
            if len(self.written) == 1 and address.startswith(_SCHEMES):
                continue
            match = _HOST_PORT.fullmatch(address)
            if match is None:
                alternatives = "" if len(self.written) > 1 else ", 'dns:///host:port' or 'unix:/path'"
                raise ValueError(f"address {address!r} is not 'host:port'{alternatives}")
            if not 0 < int(match["port"]) < 65536:
                raise ValueError(f"address {address!r}: port {match['port']} is not between 1 and 65535")

    def target(self) -> str:
        """Returns the target to open a gRPC channel with. Host names in a list are looked up here.

        Raises:
            OSError: a host name in a list has no address.
            ValueError: the hosts of a list have neither IPv4 nor IPv6 in common.
        """
        if len(self.written) == 1:
            address = self.written[0]
            return address if address.startswith(_SCHEMES) else f"dns:///{address}"
        found: list[dict[socket.AddressFamily, str]] = []
        for address in self.written:
            host, _, port = address.rpartition(":")
            # the first of each family; reversed, since later entries replace earlier ones
            resolved = reversed(socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM))
            found.append({family: str(endpoint[0]) for family, _, _, _, endpoint in resolved})
        ports = [address.rpartition(":")[2] for address in self.written]
        if all(socket.AF_INET in families for families in found):
            return "ipv4:" + ",".join(f"{families[socket.AF_INET]}:{port}" for families, port in zip(found, ports, strict=True))
        if all(socket.AF_INET6 in families for families in found):
            return "ipv6:" + ",".join(f"[{families[socket.AF_INET6]}]:{port}" for families, port in zip(found, ports, strict=True))
        raise ValueError(f"addresses {', '.join(self.written)} have neither IPv4 nor IPv6 in common")

    @property
    def authority(self) -> str | None:
        """Returns the name that a certificate must bear, where the target no longer says it: the first host of a list; else ``None``."""
        return self.written[0] if len(self.written) > 1 else None

    @property
    def proxy(self) -> Proxy | None:
        """Returns the proxy that connections go through because of the environment, or ``None``."""
        if len(self.written) > 1:
            return None
        return proxy_of(self.target())
