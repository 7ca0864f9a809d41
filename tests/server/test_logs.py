"""Logs: one JSON object a line, libraries included, and nothing that a client sent can forge a line."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from probescore_server.logs import configure_logs


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers, logging.root.level = handlers, level
    structlog.reset_defaults()


def test_json_is_one_object_a_line_with_level_logger_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("auto", "info")  # stderr is no terminal here
    structlog.get_logger("ours").info("scored", tokens=5)
    logging.getLogger("theirs").warning("said %s", "this")
    ours, theirs = map(json.loads, capsys.readouterr().err.splitlines())
    assert (ours["event"], ours["level"], ours["logger"], ours["tokens"]) == ("scored", "info", "ours", 5)
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("said this", "warning", "theirs")
    assert ours["timestamp"].endswith("Z")


def test_less_severe_messages_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json", "warning")
    structlog.get_logger("ours").info("quiet")
    logging.getLogger("theirs").info("quiet")
    assert capsys.readouterr().err == ""


def test_exceptions_are_logged_with_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json", "info")
    try:
        raise ValueError("deep inside")
    except ValueError:
        structlog.get_logger("ours").exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["exception"][0]["exc_value"] == "deep inside"


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("trick", ["a\nlevel=error", "a\x85b", "a\u2028b", "\x1b[31m"])
def test_what_a_client_sent_cannot_forge_a_line_or_a_colour(log_format: str, trick: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(log_format, "info")
    structlog.get_logger("ours").info("scored", run_id=trick)
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1
    assert trick not in shown
