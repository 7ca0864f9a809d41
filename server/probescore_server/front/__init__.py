"""Runs the server's front process, which owns the gRPC port, health and metrics, and never imports torch."""
