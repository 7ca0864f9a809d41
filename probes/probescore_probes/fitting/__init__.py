"""Fits probes to labelled rollouts, and measures how good each probe is from the scores that the serving engine computes from its file."""
