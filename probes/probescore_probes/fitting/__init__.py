"""Fit probes to labelled rollouts, and say how good they are by serving them."""
