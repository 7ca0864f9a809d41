"""Defines the constants of the gRPC contract between client and server that no protobuf message states, such as the metadata key of a
training run's name.
"""

from __future__ import annotations

JOB_KEY = "x-probescore-job"
"""Key in an RPC's metadata whose value is the name of the training run."""

ERROR_DOMAIN = "probescore"
"""The ``domain`` field in the ``ErrorInfo`` of every error status that a probescore server sends."""

MAX_FOLLOW_UP_DEPTH = 8
"""Maximum depth to which follow-ups (token ids appended to a completion) may be nested."""
