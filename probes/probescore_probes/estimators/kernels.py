"""Builds the ONNX nodes of kernel machines: support vector machines and kernel ridge regression."""

from __future__ import annotations

import numpy as np

from probescore_probes.estimators.methods import Rows
from probescore_probes.estimators.names import Estimator
from probescore_probes.nodes import Nodes


def kernel_scores(machine: Estimator, nodes: Nodes, x: str, support: Rows, dual: Rows, bias: Rows, gamma: float) -> str:
    """Adds ONNX nodes for ``Σ dual · kernel(x, support) + bias``, ``(N, columns)`` float64, and returns the name of the result.

    Args:
        machine: the fitted estimator, which states the kernel and its degree and constant.
        nodes: receives the new nodes.
        x: name of the value that the nodes read, ``(N, features)`` float64.
        support: the support vectors, ``(vectors, features)``.
        dual: the dual coefficients, ``(columns, vectors)``.
        bias: constant terms, ``(columns,)``.
        gamma: factor by which the kernel multiplies products or distances.
    """
    support = np.asarray(support, np.float64)
    products = nodes.apply("MatMul", x, nodes.constant(support.T.copy()))
    match machine.kernel:
        case "linear":
            kernel = products
        case "rbf":
            lengths = nodes.apply("ReduceSum", nodes.apply("Mul", x, x), nodes.constant(np.array([1])), keepdims=1)
            distance = nodes.apply(
                "Sub",
                nodes.apply("Add", lengths, nodes.constant((support**2).sum(axis=1))),
                nodes.apply("Mul", products, nodes.number(2)),
            )
            kernel = nodes.apply("Exp", nodes.apply("Mul", distance, nodes.number(-gamma)))
        case "poly" | "polynomial":
            kernel = nodes.apply(
                "Pow",
                nodes.apply("Add", nodes.apply("Mul", products, nodes.number(gamma)), nodes.number(machine.coef0)),
                nodes.number(machine.degree),
            )
        case _:
            kernel = nodes.apply("Tanh", nodes.apply("Add", nodes.apply("Mul", products, nodes.number(gamma)), nodes.number(machine.coef0)))
    return nodes.gemm(kernel, np.asarray(dual, np.float64), np.asarray(bias, np.float64), np.float64)
