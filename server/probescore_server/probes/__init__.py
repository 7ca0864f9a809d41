"""Probe files, checked, loaded and scored."""
