"""Makes the standard streams reliable for all commands: open, and able to write any text.

A process may be started with a stream closed, and a terminal or a pipe may use another encoding than UTF-8. Neither case may lose a result.
"""

from __future__ import annotations

import codecs
import os
import sys
from io import TextIOWrapper

LOOKALIKES = {
    "…": "...", "✓": "+", "✗": "x", "●": "*", "○": "o", "·": ".", "×": "x", "–": "-", "—": "-", "−": "-", "≤": "<=", "≥": ">=",
    "↵": "\\n", "⇥": "\\t", "⟨": "<", "⟩": ">", "“": '"', "”": '"', "‘": "'", "’": "'", "━": "-", "╸": "-", "╺": "-",
}  # fmt: skip
"""Maps the symbols that the commands print to ASCII text that looks similar."""

_ERRORS = "probescore.lookalikes"


def prepare_streams() -> None:
    """Connects closed standard streams to the null device, and makes standard output and standard error write any text.

    A character that an encoding lacks is written as similar ASCII text, or else as the number of its code point. A descriptor that stayed
    closed would be given to the next file or socket that is opened, and libraries would then write their messages into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # the lowest free descriptor is this one, since those below are open
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - open for as long as the process
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    codecs.register_error(_ERRORS, _replace_with_lookalikes)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def leave_stdout() -> None:
    """Discards all further output, because the reader of standard output has closed it; otherwise Python would report the unwritten rest as
    an error at exit.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _replace_with_lookalikes(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    written = "".join(LOOKALIKES.get(character, "") or _numbered(character) for character in lacking)
    return written, error.end


def _numbered(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode("ascii")
