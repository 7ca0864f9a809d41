"""Loads the frozen language model and runs it, reading the activations that probes need."""
