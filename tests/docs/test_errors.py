"""docs/reference/errors.md says of every status what the server sends and the client makes of it."""

import ast
import re
from pathlib import Path

import grpc
import pytest

from probescore import TransientError
from probescore._status import error_from_call
from probescore_server import errors
from probescore_server.errors import (
    CoreError,
    DeadlineExpired,
    FailedPrecondition,
    InternalFault,
    InvalidRequest,
    LimitExceeded,
    Mismatch,
    ModelRefused,
    OutOfMemory,
    ProbeRefused,
    QueueFull,
    ReadingIncomplete,
    ReadingRefused,
    ServerBusy,
    StartupError,
    WorkerLost,
    WorkerLostTwice,
    WorkerUnavailable,
)
from probescore_server.front.status_codes import CODES, status_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reference/errors.md").read_text()
SERVER = ROOT / "server/probescore_server"


def reasons_given(*kinds):
    """The reasons that the server gives errors of some kinds where they are raised, instead of those of their classes."""
    calls = [node for file in SERVER.rglob("*.py") for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    raised = [call for call in calls if getattr(call.func, "id", "") in kinds]
    words = [given.value for call in raised for given in call.args if isinstance(given, ast.Constant)]
    return {word for word in words if isinstance(word, str) and re.fullmatch(r"[A-Z_]{3,}", word)}


INVALID = "InvalidRequest", "LimitExceeded"

ERRORS = [
    InvalidRequest("groups", "none"),
    LimitExceeded("groups", 2, "spans", "max_spans", 1, "send fewer"),
    *(InvalidRequest("groups", "as the reason says", reason) for reason in sorted(reasons_given(*INVALID) - {LimitExceeded.reason})),
    *(FailedPrecondition("as the reason says", reason) for reason in sorted(reasons_given("FailedPrecondition"))),
    ReadingRefused("path", "no such folder"),
    Mismatch("expected_model_fingerprint", "a", "b"),
    QueueFull(2, 1, 0.1),
    ReadingIncomplete("model.safetensors is being written"),
    ServerBusy(2, "calls", "max_calls", 1, 0.1),
    WorkerUnavailable("starting", 0.1),
    WorkerLost("crash", "it crashed", 0.1),
    WorkerLostTwice("groups[0].completions[0]", "probe loop@1", "it crashed"),
    OutOfMemory(7),
    DeadlineExpired("too late"),
    InternalFault.new(),
]


class FailedCall:
    def __init__(self, code, metadata=()):
        self._code, self._metadata = code, metadata

    def code(self):
        return self._code

    def details(self):
        return "what was wrong"

    def trailing_metadata(self):
        return self._metadata


def rows(section):
    (part,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| `")]


def yes_or_no(error):
    return "yes" if isinstance(error, TransientError) else "no"


def test_every_error_that_has_a_status_is_tried():
    assert {type(error) for error in ERRORS} == set(CODES)


def test_reasons_are_found():
    assert {"TOO_LONG", "UNKNOWN_PROBE", "NOT_TEXT"} <= reasons_given(*INVALID)
    assert {"ASLEEP", "READING_LOST"} <= reasons_given("FailedPrecondition")


def test_each_error_of_the_server_is_in_the_table_and_nothing_else():
    sent = [(status_of(error), error) for error in ERRORS]
    raised = [(error_from_call(FailedCall(status.code, status.trailing_metadata)), error) for status, error in sent]
    expected = {(f"`{type(ours).__name__}`", f"`{ours.code}`<br>`{error.reason}`", yes_or_no(ours)) for ours, error in raised}
    documented = [tuple(row[:3]) for row in rows("On the wire")]
    assert set(documented) == expected
    assert len(documented) == len(expected)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK], ids=lambda code: code.name)
def test_what_the_client_makes_of_a_bare_status(code):
    documented = {status: row for row in rows("Without details") for status in re.findall(r"`(\w+)`", row[1]) or ["every other"]}
    row = documented.get(code.name) or documented["every other"]
    error = error_from_call(FailedCall(code))
    assert (row[0], row[2]) == (f"`{type(error).__name__}`", yes_or_no(error))


def test_each_reason_not_to_start_is_named():
    assert [row[0].strip("`") for row in rows("What keeps a server from starting")] == [
        error.__name__ for error in (StartupError, ModelRefused, ProbeRefused)
    ]


def test_every_error_of_the_core_is_on_the_page():
    declared = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CoreError)}
    assert declared == {CoreError, StartupError, ModelRefused, ProbeRefused, *CODES}
