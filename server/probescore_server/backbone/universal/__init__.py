"""Runs segments (runs of tokens) of a batch one at a time through transformers' public cache API: the universal backbone.

Replaced attention, gated MLPs and weight layouts make it fast on a CPU.
"""
