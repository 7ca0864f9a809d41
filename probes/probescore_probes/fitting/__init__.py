"""Fits probes to labelled rollouts, and measures how good each probe is by serving its file with an engine."""
