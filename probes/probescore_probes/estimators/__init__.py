"""Fitted scikit-learn estimators as probes: their scores, and the ONNX graph that computes them.

``scores`` finds which of an estimator's functions is a probe's score. What is ``linear`` in form folds into one ``Gemm``; other forms are
written by ``graph_writer`` where skl2onnx cannot, and converted by skl2onnx (``conversion``) where it can. Every graph is compared with the
estimator's own code on random rows before it is used (``comparison``); what is not written, not converted or not equal is refused by name.
"""
