"""What all tests share: a machine may be slow or busy, and how long an example takes is not what they test."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("probescore", deadline=None)
settings.load_profile("probescore")
