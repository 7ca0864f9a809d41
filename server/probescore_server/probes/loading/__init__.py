"""Loads probe files: makes each one ready to run on the loaded language model, or refuses it with a reason."""
