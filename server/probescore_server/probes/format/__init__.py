"""Probe files: what one is, and every check that needs no model."""
