"""Bounds from which directories requests may have adapters and checkpoints read: those below one directory that the operator names."""

from __future__ import annotations

import os
from pathlib import Path

from probescore_server.errors import InvalidRequest, ReadingRefused

_SHOWN = 200


def resolve_reading_path(path: str, root: Path) -> Path:
    """Returns the directory that a request means, with every link resolved.

    Args:
        path: the path in the request, absolute or relative to ``root``.
        root: the directory below which adapters and checkpoints are read.

    Raises:
        InvalidRequest: the directory does not lie below ``root``, whether it exists or not.
        ReadingRefused: there is no such directory, or a link in it leads out of ``root``.
    """
    base = root.resolve()
    try:
        directory = (base / path).resolve()
        is_below = directory != base and directory.is_relative_to(base)
        is_directory = is_below and directory.is_dir()
    except (OSError, ValueError, RuntimeError):  # such as a name that is too long, has a null character, or is a loop of links
        raise InvalidRequest("path", f"{path[:_SHOWN]!r} is no path") from None
    if not is_below:
        raise InvalidRequest("path", f"{path[:_SHOWN]!r} does not lie below the server's readings_root, with links followed")
    if not is_directory:
        raise ReadingRefused("path", f"{path[:_SHOWN]!r} is no directory that this server sees")
    check_links(directory, base)
    return directory


def check_links(directory: Path, root: Path) -> None:
    """Checks that no link in a directory leads out of ``root``, however deep it lies.

    Raises:
        ReadingRefused: one does.
    """
    base = root.resolve()
    if not directory.resolve().is_relative_to(base):
        raise ReadingRefused("path", "it does not lie below the server's readings_root any more, with links followed")
    for parent, directories, files in os.walk(directory):
        for name in (*directories, *files):
            entry = Path(parent, name)
            if entry.is_symlink() and not entry.resolve().is_relative_to(base):
                raise ReadingRefused("path", f"{name[:_SHOWN]!r} in it is a link that leads out of the server's readings_root")
