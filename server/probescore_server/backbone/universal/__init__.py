"""The universal path: a forest through transformers' public cache API, and what makes it fast on a CPU."""
