"""Runs the command line as ``python -m probescore_server.cli``."""

from probescore_server.cli import main

main()
