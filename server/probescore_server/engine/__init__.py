"""The engine: a frozen model and its probes on one device."""
