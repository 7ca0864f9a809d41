"""A frozen model and its probes, served over gRPC."""
