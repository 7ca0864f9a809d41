"""Activations on disk: sharded safetensors beside an index, written so that a run that was killed goes on, read without torch."""
