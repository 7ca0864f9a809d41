"""From a batch's activations to the scores of its completions."""
