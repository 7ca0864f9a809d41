"""Follows the probe files that a server serves: which there are, which versions names mean, and how workers get them while they score."""
