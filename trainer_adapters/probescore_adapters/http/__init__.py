"""Serves scores over HTTP: OpenRLHF's and slime's remote rewards, and JSON for everybody else, out of signals that are configured once.

A small ASGI process that is a gRPC client; ``probescore gateway`` runs it. ``pip install 'probescore[http]'``.
"""

from probescore_adapters.http.app import create_app

__all__ = ["create_app"]
