"""Loads probe files: makes each probe ready to run on the loaded language model, or refuses the probe file with a reason."""
