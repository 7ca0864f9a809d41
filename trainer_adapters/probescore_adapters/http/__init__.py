"""HTTP gateway to a probescore server: the remote-reward endpoints that the trainers OpenRLHF and slime call, and a JSON endpoint for other
programs. The signals (rules from probe scores to rewards) are configured once, at the start.

The gateway is a small ASGI application that is a gRPC client of the server. The command ``probescore gateway`` runs the gateway; install it
with ``pip install 'probescore[http]'``.
"""

from probescore_adapters.http.app import create_app

__all__ = ["create_app"]
