"""Loads a frozen language model with its probes on one device, and scores rollouts with them."""
