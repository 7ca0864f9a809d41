"""Stores a model's activations on disk as safetensors files beside an index, and reads them without torch.

A run that was interrupted while it stored activations can be continued.
"""
