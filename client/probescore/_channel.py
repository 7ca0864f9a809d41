"""Makes gRPC channels: parses server addresses, sets keepalive and message-size options that suit the options of the server, and balances
connections over several servers.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from probescore._proxies import Proxy, goes_direct, proxy_of

MAX_RECEIVE_BYTES = 64 * 1024 * 1024
"""Maximum size in bytes of a response message that the client accepts."""
KEEPALIVE_SECONDS = 60
"""Seconds between the pings that the client sends while an RPC is open and the server sends nothing."""
KEEPALIVE_TIMEOUT_SECONDS = 20
"""Seconds without a reply to a ping after which the connection counts as lost."""
MIN_PING_SECONDS = 30
"""Shortest time in seconds between pings that a server must allow; a stricter server would close the connection of a client that waits for
a response."""
LOOKUP_SECONDS = 5
"""Shortest time in seconds between two DNS look-ups of a host name; the client looks a name up when a connection ends or cannot be made."""
DEFAULT_ADDRESS = "localhost:50051"

_RECONNECT_SECONDS = (0.2, 1.0)
_CONNECT_SECONDS = (2.0, 20.0)
_CONNECT_SHARE = 0.05
_HOST_PORT = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.%]+)\]|(?P<host>[^\s:/\[\],]+)):(?P<port>\d{1,5})")
_DNS_TARGET = re.compile(r"dns:(?:///)?(?P<host>\[[^\]]*\]|[^/:\[\]]+)(?::(?P<port>\d{1,5}))?")
_DEFAULT_PORT = "443"
"""Port of a ``dns:`` target without one, as in gRPC."""
_SCHEMES = ("dns:", "unix:", "unix-abstract:", "ipv4:", "ipv6:", "xds:")

SERVICE_CONFIG: dict[str, list[dict[str, dict[str, str]]]] = {"loadBalancingConfig": [{"round_robin": {}}]}


def channel_options(restart_budget: float, target: str) -> list[tuple[str, str | int]]:
    """Returns the gRPC options for every channel of a client. A server must allow pings every ``MIN_PING_SECONDS`` seconds for these
    options.

    Args:
        restart_budget: seconds for which an RPC may be retried; one attempt to connect may take a twentieth of this time, but at least 2 s.
        target: gRPC target that the channel connects to.
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
    """Value object with the addresses of the servers that a client was given.

    A single address is ``"host:port"``, ``"dns:///host:port"`` (round robin over all IP addresses that the name resolves to) or
    ``"unix:/path"``. Several addresses are a list ``["host:port", …]``, used in turn.

    Raises:
        ValueError: an address has none of these forms.
    """

    written: tuple[str, ...]
    one_of: str = ""
    """The name, or the first of several, by which this server and others are known; empty for all servers of a client."""

    @classmethod
    def of(cls, addresses: str | Sequence[str]) -> Addresses:
        """Makes ``Addresses`` from one string or a sequence of strings, in the forms that a user may pass to a client."""
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
        """Returns the target with which a gRPC channel to the client's servers is opened. Host names in a list of several addresses are
        looked up in this call.

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

    def each(self) -> tuple[Addresses, ...]:
        """Returns the addresses of each server on its own. Host names are looked up in this call; of a name with IPv4 and IPv6 addresses,
        which are taken to be the same servers, the family with more addresses counts.

        Raises:
            OSError: a host name has no address.
            ValueError: the servers cannot be told, as those of an ``xds:`` name.
        """
        if len(self.written) > 1:
            found, named = list(self.target().partition(":")[2].split(",")), self.written[0]
        elif self.written[0].startswith(("unix:", "unix-abstract:")) or self.proxy is not None:
            return (self,)
        elif self.written[0].startswith(("ipv4:", "ipv6:")):
            found, named = self.written[0].partition(":")[2].split(","), self.written[0]
        else:
            found, named = _looked_up(self.target())
        endpoints = tuple(dict.fromkeys(found))
        return (self,) if len(endpoints) == 1 else tuple(Addresses((endpoint,), named) for endpoint in endpoints)

    @property
    def authority(self) -> str | None:
        """Returns the host name that the server's TLS certificate must bear: the first host if the client has a list of addresses; ``None``
        if it has a single address, since gRPC then takes the name from its target.
        """
        return self.one_of or (self.written[0] if len(self.written) > 1 else None)

    @property
    def proxy(self) -> Proxy | None:
        """Returns the proxy that the environment variables make gRPC use for connections to the client's server addresses, or ``None`` if
        there is no proxy.
        """
        if len(self.written) > 1 or self.one_of:
            return None
        return proxy_of(self.target())


def _looked_up(target: str) -> tuple[list[str], str]:
    """Returns the addresses ``host:port`` of all servers that a gRPC target ``dns:…`` resolves to, and the name that was looked up."""
    match = _DNS_TARGET.fullmatch(target)
    if match is None:
        raise ValueError(f"the servers behind {target!r} cannot be told apart: give their addresses, as a list of 'host:port'")
    host, port = match["host"].strip("[]"), match["port"] or _DEFAULT_PORT
    by_family: dict[socket.AddressFamily, dict[str, None]] = {socket.AF_INET: {}, socket.AF_INET6: {}}
    for family, _, _, _, endpoint in socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM):
        if family in by_family:
            written = f"[{endpoint[0]}]" if family == socket.AF_INET6 else str(endpoint[0])
            by_family[family][f"{written}:{port}"] = None
    most = max(by_family.values(), key=len)
    return list(most), f"{match['host']}:{port}"
