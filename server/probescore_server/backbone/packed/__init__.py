"""Runs many segments (runs of tokens) of a batch at once, as one row with a variable-length attention kernel on CUDA devices: the packed
path.
"""
