"""The packed path: a forest as one row of tokens, with a variable-length attention kernel, for CUDA."""
