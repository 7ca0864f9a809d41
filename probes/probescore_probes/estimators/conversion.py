"""Converts scikit-learn estimators to ONNX nodes with skl2onnx."""

from __future__ import annotations

from collections.abc import Sequence

from probescore_probes.estimators.names import Estimator
from probescore_probes.estimators.refusals import no_conversion
from probescore_probes.exporter_warnings import quietly
from probescore_probes.nodes import ML_OPSET, OPSET, Nodes


def converted(steps: Sequence[Estimator], method: str, nodes: Nodes, x: str, width: int, name: str) -> str:
    """Converts fitted pipeline steps, the last of which may be an estimator, to ONNX nodes, and returns the name of the result.

    Args:
        steps: transformers and estimators that apply one after another, all fitted.
        method: method of the last step whose result is computed.
        nodes: receives the new nodes.
        x: name of the value that the nodes read, ``(N, width)``.
        width: number of features in each input row of the first step.
        name: name of the whole estimator, for messages.

    Raises:
        ValueError: skl2onnx cannot convert the steps, or converts them to operators that are not standard ONNX.
    """
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.pipeline import make_pipeline

    try:
        with quietly("skl2onnx"):
            model = to_onnx(
                make_pipeline(*steps) if len(steps) > 1 else steps[0],
                initial_types=[("x", FloatTensorType([None, width]))],
                options={"zipmap": False} if method == "predict_proba" else None,
                target_opset={"": OPSET, "ai.onnx.ml": ML_OPSET},
            )
    except Exception:  # whatever a converter raises for what it does not know
        raise ValueError(no_conversion(name, "skl2onnx does not convert it")) from None
    if model.functions or any(node.domain not in ("", "ai.onnx.ml") for node in model.graph.node):
        raise ValueError(no_conversion(name, "skl2onnx makes operators of it that are not standard ONNX"))
    return nodes.inline(model, x)
