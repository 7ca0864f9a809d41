"""Defines the format of a probe file, and makes every check of a probe file that needs no language model."""
