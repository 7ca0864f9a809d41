"""From a probe file to a probe that is ready to run on the model that is loaded, or to a refusal."""
