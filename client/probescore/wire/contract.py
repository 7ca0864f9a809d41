"""Holds what the contract fixes beside its messages."""

from __future__ import annotations

JOB_KEY = "x-probescore-job"
"""Is the key of a call's metadata that names its training run."""

ERROR_DOMAIN = "probescore"
"""Is the domain in the ``ErrorInfo`` of a status that a probescore server made."""

MAX_FOLLOW_UP_DEPTH = 8
"""Limits how deep follow-ups may nest."""
