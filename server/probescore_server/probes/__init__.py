"""Probe files: manifest, checks, writing, running."""
