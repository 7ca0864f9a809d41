"""Loads the frozen language model, runs it on batches of rollouts, and copies out the activations that probes need."""
