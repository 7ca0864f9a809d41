"""Files that are there as a whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import secrets
from pathlib import Path


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
