"""Follows the probe files that a server serves: which files there are, which probe versions the names in requests mean, and how worker
processes get new probes while they score.
"""
