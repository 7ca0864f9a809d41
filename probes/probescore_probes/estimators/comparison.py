"""Compares an estimator's ONNX graph with the estimator's own code on random rows; only a graph that gives the same scores is used."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from probescore_probes.estimators.methods import Rows
from probescore_probes.estimators.refusals import no_conversion
from probescore_probes.nodes import Nodes

_TOLERANCE = 1e-4  # of the scores' standard deviation, as golden vectors have it
_MOST_ROUNDING = 1e-2  # a larger difference is no rounding
_LARGEST, _LEAST_ROWS = 1e30, 8  # rows with larger scores are not compared: float32 ends at 3e38


def check_same(nodes: Nodes, x: str, result: str, rows: NDArray[np.float32], expected: Rows, rounding: Rows, name: str) -> None:
    """Checks that ONNX nodes compute the same scores as an estimator's own code.

    Args:
        nodes: the nodes that compute the scores.
        x: name of the value that the nodes read, ``(N, width)`` float32.
        result: name of the value that holds the scores.
        rows: random rows, ``(N, width)``.
        expected: the estimator's own scores of these rows, ``(N, columns)``.
        rounding: how much these scores change if the rows are rounded, ``(N, columns)``.
        name: name of the estimator, for messages.

    Raises:
        ValueError: the estimator's scores are not finite, or the nodes do not run, or give scores of another shape or scores that differ
            too much.
    """
    finite = (np.abs(expected) < _LARGEST).all(axis=1)
    if finite.sum() < _LEAST_ROWS:
        raise ValueError(f"estimator: {name} gives scores that are not finite on {int((~finite).sum())} of {len(rows)} random rows")
    rows, expected, rounding = rows[finite], expected[finite], rounding[finite]
    graph = "the graph that skl2onnx makes of it" if nodes.inlines else "the graph that probescore makes of it"
    try:
        with np.errstate(all="ignore"):
            (found,) = ReferenceEvaluator(nodes.model(x, rows.shape[1], result)).run(None, {x: rows})
    except Exception as error:  # whatever numpy raises inside the operators
        raise ValueError(no_conversion(name, f"{graph} does not run ({type(error).__name__})")) from None
    found = np.asarray(found)
    if found.shape != expected.shape:
        raise ValueError(no_conversion(name, f"{graph} gives scores {found.shape}, not {expected.shape}"))
    spread = expected.std(axis=0)
    spread = np.where(spread > 0, spread, 1 + np.abs(expected[0]))
    allowed = _TOLERANCE + np.minimum(np.nan_to_num(rounding / spread, nan=np.inf), _MOST_ROUNDING)
    off = np.abs(found - expected) / spread
    if not (off <= allowed).all():
        worst = float(np.nan_to_num(off, nan=np.inf).max())
        raise ValueError(no_conversion(name, f"{graph} is {worst:.2g} standard deviations off on random rows"))
