"""Reads adapters and checkpoints as training writes them, and makes of them copies of the frozen decoder that differ as the files say."""
