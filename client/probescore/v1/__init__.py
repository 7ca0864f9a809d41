"""Generated from proto/probescore/v1 by `make proto`."""
