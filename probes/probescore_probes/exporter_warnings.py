"""Silences warnings of ONNX exporters that are of no use to the author of a probe."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quietly(exporter: str) -> Iterator[None]:
    """Silences an exporter's warnings within the context; problems that concern a probe's author are raised as errors.

    Args:
        exporter: name of the exporter's logger.
    """
    logger = logging.getLogger(exporter)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
