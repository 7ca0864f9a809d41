"""Many probes as a few matrix products.

A speed-up that may be deleted safely: what is not stacked runs as a graph of its own, and scores the same. It is worth its lines where a
server has many probes: hundreds of sessions of onnxruntime, one after the other for each batch, cost more than the model's forward pass.
"""
