"""Runs segments (runs of tokens) of a batch one at a time through transformers' public cache API: the universal path.

Its changes to attention, gated MLPs and weights make it fast on a CPU.
"""
