"""Runs language models and probes in worker processes, one per device, and connects them to the server's front process, which owns the
port.
"""
