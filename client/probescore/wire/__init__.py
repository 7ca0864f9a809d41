"""Converts values to and from the messages of the contract, by pure functions that the client and the server share.

Reading refuses whatever breaks the contract with a ``MessageError`` that names the field.
"""

from probescore.wire.requests import (
    RequestOptions,
    group_to_proto,
    groups_from_request,
    options_from_request,
    options_to_proto,
    request_to_proto,
)
from probescore.wire.responses import result_from_proto, result_to_proto, streamed_from_proto, streamed_to_proto
from probescore.wire.server_info import (
    probes_from_proto,
    probes_to_proto,
    server_info_from_proto,
    server_info_to_proto,
    transfers_from_proto,
    transfers_to_proto,
)
from probescore.wire.tensors import MessageError

__all__ = [
    "MessageError",
    "RequestOptions",
    "group_to_proto",
    "groups_from_request",
    "options_from_request",
    "options_to_proto",
    "probes_from_proto",
    "probes_to_proto",
    "request_to_proto",
    "result_from_proto",
    "result_to_proto",
    "server_info_from_proto",
    "server_info_to_proto",
    "streamed_from_proto",
    "streamed_to_proto",
    "transfers_from_proto",
    "transfers_to_proto",
]
