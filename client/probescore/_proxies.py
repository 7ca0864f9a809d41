"""Determines which proxy gRPC takes from the environment variables for a connection, and which connections must not use a proxy."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Names of the environment variables that gRPC reads for a proxy, in gRPC's order. The first variable that is set counts, also if it is
empty. gRPC does not read names in capitals.
"""

_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")
_TARGET = re.compile(r"(?:dns:(?://[^/]*/)?|ipv4:|ipv6:)?(?P<host>\[[^\]]*\]|[^\[\],]*?)(?::\d+)?")
_LOOPBACK_NAMES = {"localhost", "localhost.localdomain", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback"}


@dataclass(frozen=True)
class Proxy:
    """Value object with a proxy that the environment names: the name of the environment variable, and the proxy's address without its
    password.
    """

    variable: str
    location: str


def goes_direct(target: str) -> bool:
    """Returns whether connections to a gRPC target (a server's address) must not go through a proxy. This is so for targets on this
    machine, which need no proxy, and for targets with several addresses, which gRPC would pass to a proxy as if they were one name.
    """
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    host = _host(target)
    return host is None or _is_loopback(host)


def proxy_of(target: str, environment: Mapping[str, str] = os.environ) -> Proxy | None:
    """Returns the proxy that gRPC uses for connections to a target (a server's address), or ``None`` if gRPC uses none."""
    if target.startswith("xds:") or goes_direct(target):
        return None
    variable = next((name for name in _VARIABLES if name in environment), None)
    if variable is None:
        return None
    try:
        proxy = urlsplit(environment[variable])
        location = f"{proxy.hostname}:{proxy.port or 80}"
    except ValueError:
        return None
    if proxy.scheme != "http" or not proxy.hostname or _is_excepted(_host(target) or "", environment):
        return None
    return Proxy(variable, location)


def _host(target: str) -> str | None:
    """Returns the single host of a gRPC target (a server's address), or ``None`` if the target has several hosts."""
    match = _TARGET.fullmatch(target)
    return match["host"].strip("[]") if match else None


def _is_loopback(host: str) -> bool:
    name = host.rstrip(".").lower()
    if name in _LOOPBACK_NAMES or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        try:
            address = ipaddress.IPv4Address(socket.inet_aton(name))  # "127.1"
        except (OSError, UnicodeError):
            return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)


def _is_excepted(host: str, environment: Mapping[str, str]) -> bool:
    """Returns whether the environment variable ``no_grpc_proxy`` or ``no_proxy`` excepts a host from the proxy. As in gRPC, its entries are
    ends of host names, or IP networks.
    """
    variable = next((name for name in _EXCEPTIONS if name in environment), None)
    if variable is None:
        return False
    for entry in environment[variable].split(","):
        end = entry.strip().lower()
        if end and (host.lower().endswith(end) or _is_within(host, end)):
            return True
    return False


def _is_within(host: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False
