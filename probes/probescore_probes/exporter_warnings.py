"""What exporters warn of that is of no use to an author."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quietly(exporter: str) -> Iterator[None]:
    """Without an exporter's warnings on what it is built from; what a probe's author must know is raised.

    Args:
        exporter: the name of its logger.
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
