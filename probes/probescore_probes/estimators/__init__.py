"""Turns fitted scikit-learn estimators into probes: the scores of an estimator, and the ONNX graph that computes these scores.

``scores`` finds the method of an estimator that gives the probe's scores. An estimator that is ``linear`` in form becomes one ``Gemm``.
Other estimators are converted by skl2onnx (``conversion``) where it can, and written by ``graph_writer`` where it cannot. Every graph is
compared with the estimator's own code on random rows before the graph is used (``comparison``). An estimator for which no graph gives the
same scores is refused by name.
"""
