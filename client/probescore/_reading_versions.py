"""Checks of which readings (whose activations are read) a server's answers to the client are: that they are those that were asked for, and
that all answers of one call are of one version of each.
"""

from __future__ import annotations

from collections.abc import Sequence

from probescore.errors import FieldViolation, MismatchError, ServerError
from probescore.types import FROZEN, Reading, ReadingKind
from probescore.wire import MessageError


def check_readings(asked: Sequence[str], came: Sequence[Reading], model_fingerprint: str, field: str, *, done: str) -> None:
    """Checks that the readings (whose activations are read) which an answer names are those that were asked for.

    Args:
        asked: the names that were asked for; empty = the frozen model, without a name.
        came: the descriptions in the answer.
        model_fingerprint: fingerprint of the frozen model, as the answer states it.
        field: path of a description in the answer, with ``[{}]`` for its index if there may be several, for error messages.
        done: what the server was to do with them, "scored" or "read", for error messages.

    Raises:
        MessageError: they are others, or a description contradicts itself.
        ServerError: the server does not know what readings are, and has answered for the frozen model instead.
    """
    names = [reading.name for reading in came]
    if asked and not names:
        problem = f"the server does not know readings, and has {done} the frozen model instead of {', '.join(asked)}: upgrade it"
        raise ServerError(problem, "UNIMPLEMENTED", "READINGS_IGNORED", (FieldViolation("readings", problem),))
    if [*asked] != names:
        raise MessageError(field.replace("[{}]", ""), f"is {', '.join(names)[:500]}; {', '.join(asked)[:500] or 'none'} was asked for")
    for index, reading in enumerate(came):
        _check_reading(reading, model_fingerprint, field.format(index))


def _check_reading(reading: Reading, model_fingerprint: str, field: str) -> None:
    if not reading.id:
        raise MessageError(f"{field}.id", "is empty: nobody could say which version was read")
    if (reading.name == FROZEN) != (reading.kind is ReadingKind.FROZEN):
        raise MessageError(f"{field}.kind", f"is {reading.kind.value}, of a reading named {reading.name}")
    if reading.name == FROZEN and reading.id != model_fingerprint:
        raise MessageError(f"{field}.id", f"is {reading.id[:100]}; for the frozen model {model_fingerprint} was expected")


class VersionsOfCall:
    """The versions of readings (whose activations are read) in the answers to one call of a client's method, which may take several RPCs.

    Args:
        call: what the call is, for error messages, such as ``"stream"``.
        answers: what its answers are, such as ``"scores"``.
    """

    def __init__(self, call: str, answers: str) -> None:
        self._call = call
        self._answers = answers
        self._first: dict[str, Reading] = {}

    def check(self, reading: Reading) -> None:
        """Checks that an answer is of the same version of a reading as the call's answers before.

        Raises:
            MismatchError: it is of another; the reason is ``READING_CHANGED``.
        """
        before = self._first.setdefault(reading.name, reading)
        if before.id != reading.id:
            problem = (
                f"reading {reading.name!r} came to mean {_version(reading)} instead of {_version(before)} during the {self._call}, and "
                f"{self._answers} of both would be mixed: load readings between {self._call}s, on all servers of the client, and ask for "
                "what is left in a new one"
            )
            raise MismatchError(problem, "FAILED_PRECONDITION", "READING_CHANGED", (FieldViolation("readings", problem),))


def _version(reading: Reading) -> str:
    return reading.id[:100] + (f" of step {reading.step}" if reading.step is not None else "")
