"""Checks the content of a request and turns it into rollouts of token ids that are ready to be scored.

The error of a failed check names the invalid field by its path in the request message. The server's front process, which owns the port, and
``Engine.score`` both use this package, so it imports neither torch nor grpc.
"""
