"""Graphs that certainly compute row by row: no score depends on another row, on how many there are, or on its place among them."""

from __future__ import annotations

import onnx

from probescore_server.probes.graph import Signature
from probescore_server.probes.graph_layers import read_network


def is_row_by_row(model: onnx.ModelProto, signature: Signature) -> bool:
    """Whether the operators of a checked graph prove it."""
    return read_network(model, signature) is not None
