"""Files as a whole or not at all: read where they are regular, bounded and the same from the first byte to the last; written beside their
place, then renamed.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

_PIECE_BYTES = 1 << 24
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnreadableFile(Exception):
    """A file that cannot be read as a whole.

    Args:
        field: what was checked: ``file`` or ``file size``.
        found: what is there.
        expected: what should be.
    """

    def __init__(self, field: str, found: str, expected: str) -> None:
        super().__init__(f"{field}: found {found}, expected {expected}")
        self.field = field
        self.found = found
        self.expected = expected


def read_regular_file(path: Path | str, max_bytes: int) -> bytes:
    """The content of a regular file, or of what a link to one leads to. Nothing else is waited for: a pipe is refused at once.

    Raises:
        UnreadableFile: it is something else, cannot be opened, is larger, or changes while it is read.
    """
    try:
        # a pipe would be waited for until somebody writes to it
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UnreadableFile("file", kind_of(path) or error.strerror or type(error).__name__, "a readable regular file") from None
    try:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise UnreadableFile("file", _KINDS.get(stat.S_IFMT(before.st_mode), "something else"), "a regular file")
        if before.st_size > max_bytes:
            raise UnreadableFile("file size", f"{before.st_size} bytes", f"at most {max_bytes}")
        content = bytearray()
        # one byte more than there should be, and no further, however fast it grows
        while piece := os.read(descriptor, min(_PIECE_BYTES, before.st_size + 1 - len(content))):
            content += piece
        after = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if len(content) != before.st_size or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UnreadableFile("file", "a file that changes while it is read", "one that is written before it is given")
    return bytes(content)


def kind_of(path: Path | str) -> str:
    """What stands at a path in place of a regular file; empty if it is one, or nothing is there."""
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return ""
    return "" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "something else")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file; whoever reads it meanwhile sees what was there before.

    Args:
        path: replaced if it exists. What is no regular file (a pipe, ``/dev/stdout``) is written to as it is.
        content: all of it.

    Raises:
        OSError: it cannot be written; nothing is left beside it. Its ``filename`` is the path.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(content)
        return
    target = path.resolve()  # a link stays one, and what it leads to is replaced
    # as any file is made: a temporary one of Python's nobody else could read, such as a server that runs as another user
    partial = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}")
    try:
        partial.write_bytes(content)
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise type(error)(error.errno, error.strerror, str(path)) from None
