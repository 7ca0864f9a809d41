"""A name server of one name, as a cluster has one for each headless service: IPv4 addresses, over UDP."""

from __future__ import annotations

import socket
import socketserver
import struct
import threading
from types import TracebackType

_TYPE_A, _CLASS_IN = 1, 1
_TTL_SECONDS = 1
_HEADER_BYTES = 12
_AUTHORITATIVE_ANSWER = 0x8400
_NAME_OF_THE_QUESTION = 0xC000 | _HEADER_BYTES


class NameServer:
    """Resolves every name to the same addresses; a context manager that stops it.

    Attributes:
        addresses: IPv4 addresses; those of the moment when the question comes count.
        authority: where it listens, for ``dns://authority/name:port``.
    """

    def __init__(self, addresses: list[str]) -> None:
        self.addresses = addresses
        names = self

        class Answering(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                query, transport = self.request
                transport.sendto(_answer(query, names.addresses), self.client_address)

        self._server = socketserver.UDPServer(("127.0.0.1", 0), Answering)
        self.authority = f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> NameServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


def _answer(query: bytes, addresses: list[str]) -> bytes:
    """The answer to a question: a record for each address, or none if it asks for anything but IPv4."""
    # the name ends with a label of length 0; two bytes each of type and class follow
    end = query.index(0, _HEADER_BYTES) + 5
    kind = int.from_bytes(query[end - 4 : end - 2], "big")
    found = addresses if kind == _TYPE_A else []
    records = [
        struct.pack(">HHHIH", _NAME_OF_THE_QUESTION, _TYPE_A, _CLASS_IN, _TTL_SECONDS, 4) + socket.inet_aton(address) for address in found
    ]
    header = query[:2] + struct.pack(">HHHHH", _AUTHORITATIVE_ANSWER, 1, len(records), 0, 0)
    return header + query[_HEADER_BYTES:end] + b"".join(records)
