"""Checks the content of a request and turns it into rollouts of token ids that are ready to be scored.

Each check names the field at fault by its path in the request message. The front process and ``Engine.score`` both use this package, so it
imports neither torch nor grpc.
"""
