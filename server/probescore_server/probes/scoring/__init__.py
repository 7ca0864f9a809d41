"""Computes the scores of a batch of completions from the language model's activations."""
