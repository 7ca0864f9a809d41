"""Computes many probes together in a few matrix products.

This package is a speed-up that could be removed without changing any score: a probe that is not computed together with others runs
as an ONNX graph of its own. The speed-up matters for a server with many probes: hundreds of onnxruntime sessions, run one after another for
each batch, cost more than the language model's forward pass.
"""
