"""Runs a forest of token segments through transformers' public cache API, with changes that make it fast on a CPU: the universal path."""
