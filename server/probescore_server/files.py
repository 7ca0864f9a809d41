"""Reads and writes complete files, never parts of them.

A file is read only if it is a regular file of bounded size that does not change while it is read. A file is written under another name in
the same directory and then renamed.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

MAX_PROBE_FILE_BYTES = 256 * 2**20
"""Limits the size of a probe file, in bytes: 64 million float32 weights, such as an SAE encoder of 16,384 × 4,096."""

MAX_ADAPTER_BYTES = 2 * 2**30
"""Limits the size of the adapter that lies beside a probe file, in bytes."""

_ADAPTER_SUFFIX = ".adapter.safetensors"
_PIECE_BYTES = 1 << 24
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnreadableFile(Exception):
    """Exception raised when a path is not a regular file, or the file cannot be opened, is too large, or changes while it is read.

    Args:
        field: the property that was checked: ``file`` or ``file size``.
        found: a description of the file or its size as found.
        expected: a description of the file or size that was expected.
    """

    def __init__(self, field: str, found: str, expected: str) -> None:
        super().__init__(f"{field}: found {found}, expected {expected}")
        self.field = field
        self.found = found
        self.expected = expected


def adapter_path(path: Path | str) -> Path:
    """Returns the path where the adapter of a probe file lies, if the probe brings one: ``cheating.adapter.safetensors`` beside
    ``cheating.onnx``.
    """
    path = Path(path)
    return path.with_name(path.name.removesuffix(".onnx") + _ADAPTER_SUFFIX)


def read_adapter_beside(path: Path | str) -> bytes | None:
    """Returns the content of the adapter that lies beside a probe file; ``None`` if there is none.

    Raises:
        UnreadableFile: the adapter is not a regular file, cannot be opened, is too large, or changes while it is read.
    """
    beside = adapter_path(path)
    if not os.path.lexists(beside):
        return None
    try:
        return read_regular_file(beside, MAX_ADAPTER_BYTES)
    except UnreadableFile as error:
        raise UnreadableFile("adapter", f"in place of {beside.name} {error.found}", error.expected) from None


def read_regular_file(path: Path | str, max_bytes: int) -> bytes:
    """Returns the content of a regular file, at a path that may be a symbolic link. A pipe is refused at once instead of being waited for.

    Raises:
        UnreadableFile: the path is not a regular file, cannot be opened, is larger than ``max_bytes``, or changes while it is read.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait until somebody writes to it.
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
        # At most one byte more than there should be is read, however fast the file grows.
        while piece := os.read(descriptor, min(_PIECE_BYTES, before.st_size + 1 - len(content))):
            content += piece
        after = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if len(content) != before.st_size or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UnreadableFile("file", "a file that changes while it is read", "one that is written before it is given")
    return bytes(content)


def kind_of(path: Path | str) -> str:
    """Returns a name such as ``a directory`` for a path that is not a regular file, and an empty string for a regular file or a missing
    path.
    """
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return ""
    return "" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "something else")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a concurrent reader sees either the whole old content or the whole new content.

    Args:
        path: the file, replaced if it exists. A path that exists and is no regular file (a pipe, ``/dev/stdout``) is written to directly.
        content: the whole new content.

    Raises:
        OSError: the file cannot be written; no partial file is left. The error's ``filename`` is the path.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(content)
        return
    target = path.resolve()  # A symbolic link stays one, and the file that it leads to is replaced.
    # Not a temporary file of Python's: nobody else could read it, such as a server that runs as another user.
    partial = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}")
    try:
        partial.write_bytes(content)
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise type(error)(error.errno, error.strerror, str(path)) from None
