"""The adapters' logger, of the standard library: a trainer's process has its own way of showing logs."""

import logging

logger = logging.getLogger("probescore_adapters")
