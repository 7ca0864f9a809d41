"""The frozen model: loading, reading, running."""
