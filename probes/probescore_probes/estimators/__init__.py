"""Turns fitted scikit-learn estimators into probes: their scores, and the ONNX graph that computes these.

``scores`` finds which of an estimator's functions is a probe's score. An estimator that is ``linear`` in form becomes one ``Gemm``; other
forms are written by ``graph_writer`` where skl2onnx cannot convert them, and converted by skl2onnx (``conversion``) where it can. Every
graph is compared with the estimator's own code on random rows before it is used (``comparison``); an estimator that is not written, not
converted or not reproduced is refused by name.
"""
