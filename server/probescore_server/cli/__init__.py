"""Implements the command line ``probescore``, which scores rollouts with probes, fits and checks probes, and shows what a server does."""

from __future__ import annotations

import sys

from probescore_server.cli.common.streams import prepare_streams


def main() -> None:
    """Runs the command line; if a package that the command line needs is missing, prints what to install."""
    prepare_streams()
    if sys.argv[1:2] == ["healthcheck"]:
        _healthcheck()
    try:
        from probescore_server.cli.app import app
    except ModuleNotFoundError as missing:
        if missing.name not in ("typer", "rich"):
            raise
        sys.exit("probescore: the command line needs more than the client: pip install 'probescore[cli]'")
    app()


def _healthcheck() -> None:
    # imported alone, since all commands together take most of a second to import
    try:
        from probescore_server.cli.healthcheck import app
    except ModuleNotFoundError:
        return  # main then loads the whole command line, which says what is missing
    app()
