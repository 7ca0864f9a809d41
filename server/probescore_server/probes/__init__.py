"""Checks, loads and runs probe files: small classifiers over a language model's activations, stored as ONNX graphs."""
