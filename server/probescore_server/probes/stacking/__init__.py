"""Computes many probes together in a few matrix products.

This package is a speed-up that could be removed without changing any score: a probe that is not stacked runs as a graph of its own. It pays
where a server has many probes: hundreds of onnxruntime sessions, one after the other for each batch, cost more than the model's forward
pass.
"""
