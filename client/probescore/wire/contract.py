"""What the contract fixes beside its messages."""

from __future__ import annotations

JOB_KEY = "x-probescore-job"
"""The metadata entry of a call that names its training run."""

ERROR_DOMAIN = "probescore"
"""Of the ``ErrorInfo`` of a status that the server made."""

MAX_FOLLOW_UP_DEPTH = 8
"""How deep follow-ups may nest."""
