"""Pure functions, shared by client and server, that convert value objects to and from the protobuf messages of the gRPC contract between
them.

Functions that read a message raise ``MessageError``, which names the faulty field, if the message violates the contract.
"""

from probescore.wire.activations import (
    ActivationOptions,
    activation_options_from_request,
    activation_options_to_proto,
    activations_info_from_proto,
    activations_info_to_proto,
    begin_to_proto,
    rows_from_proto,
    rows_to_proto,
)
from probescore.wire.readings import loaded_reading_from_proto, loaded_reading_to_proto, reading_from_proto, reading_to_proto
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
    reloaded_from_proto,
    reloaded_to_proto,
    server_info_from_proto,
    server_info_to_proto,
    transfers_from_proto,
    transfers_to_proto,
)
from probescore.wire.tensors import MessageError

__all__ = [
    "ActivationOptions",
    "MessageError",
    "RequestOptions",
    "activation_options_from_request",
    "activation_options_to_proto",
    "activations_info_from_proto",
    "activations_info_to_proto",
    "begin_to_proto",
    "group_to_proto",
    "groups_from_request",
    "loaded_reading_from_proto",
    "loaded_reading_to_proto",
    "options_from_request",
    "options_to_proto",
    "probes_from_proto",
    "probes_to_proto",
    "reading_from_proto",
    "reading_to_proto",
    "reloaded_from_proto",
    "reloaded_to_proto",
    "request_to_proto",
    "result_from_proto",
    "result_to_proto",
    "rows_from_proto",
    "rows_to_proto",
    "server_info_from_proto",
    "server_info_to_proto",
    "streamed_from_proto",
    "streamed_to_proto",
    "transfers_from_proto",
    "transfers_to_proto",
]
