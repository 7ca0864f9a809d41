"""Writes structured logs to stderr: lines for people on a terminal, else one JSON object per line. Logs of libraries are included."""

from __future__ import annotations

import io
import logging
import sys
from typing import Literal, TextIO

import structlog


def configure_logs(log_format: Literal["auto", "console", "json"], log_level: str) -> None:
    """Routes the logs of structlog and of the standard library's ``logging`` to stderr.

    Args:
        log_format: ``console``, ``json``, or ``auto`` = ``console`` if stderr is a terminal, else ``json``.
        log_level: the least severe level that is written: ``debug``, ``info``, ``warning`` or ``error``.
    """
    readable = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if readable else "iso", utc=not readable),
    ]
    # Both renderings escape texts of clients, file names and manifests, so that those cannot forge lines or colours.
    rendering: list[structlog.typing.Processor] = (
        [
            _escape_event,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), repr_native_str=True, exception_formatter=_write_traceback),
        ]
        if readable
        else [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.PositionalArgumentsFormatter(), *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    logging.root.handlers = [handler]
    logging.root.setLevel(log_level.upper())
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )


def _escape_event(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Escapes the event's text as a structlog processor, since the console renderer quotes all other values but not the event."""
    del logger, method
    event["event"] = _escaped(str(event["event"]))
    return event


def _write_traceback(stream: TextIO, exc_info: structlog.typing.ExcInfo) -> None:
    """Writes a traceback with its unprintable characters escaped, since an exception's text, too, may come from a file or a client."""
    written = io.StringIO()
    structlog.dev.plain_traceback(written, exc_info)
    stream.write("\n".join(map(_escaped, written.getvalue().split("\n"))))


def _escaped(line: str) -> str:
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)
