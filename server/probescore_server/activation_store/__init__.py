"""Stores activations on disk as safetensors files beside an index, and reads them without torch.

A run that was interrupted can be continued.
"""
