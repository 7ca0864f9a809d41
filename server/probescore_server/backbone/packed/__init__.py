"""Runs a forest of token segments as one row of tokens with a variable-length attention kernel, on CUDA devices: the packed path."""
