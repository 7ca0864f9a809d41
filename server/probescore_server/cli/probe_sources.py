"""Finds and reads the probe files that an argument of a command names: a file, a folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probescore.types import version_order
from probescore_server.cli.common.failures import say
from probescore_server.hub_probes import PREFIX, local_paths

if TYPE_CHECKING:
    from probescore_server.errors import ProbeRefused
    from probescore_server.probes.format.probe_file import ProbeFile

ProbeSource = Annotated[
    str,
    typer.Argument(
        help="A probe file, a folder of them, or those of a repository on the Hugging Face hub: hf:ORGANISATION/REPOSITORY, with @REVISION "
        "and :FILE if wanted.",
        show_default=False,
        metavar="FILE|DIR|hf:…",
    ),
]


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """The probe files of one source.

    Attributes:
        probes: the files that pass every check which needs no model, sorted by name, then version.
        refused: why each of the others was refused.
    """

    probes: tuple[ProbeFile, ...]
    refused: tuple[ProbeRefused, ...]


def files_of(source: str) -> tuple[str, ...]:
    """Returns the paths of the probe files of a source, at least one, and says which files of the hub were taken.

    Raises:
        OSError: there is no such file or folder.
        ProbeRefused: the hub cannot be reached, or has no such repository, revision or file.
        ValueError: a folder has no probe file.
    """
    if source.startswith(PREFIX):
        return local_paths([source], say)
    path = Path(source)
    if not path.is_dir():
        path.stat()  # raises the error that names the path
        return (source,)
    names = sorted(name for name in os.listdir(path) if name.endswith(".onnx") and not name.startswith("."))  # noqa: PTH208
    if not names:
        raise ValueError(f"{source}: there are no probe files (*.onnx) in it")
    return tuple(str(path / name) for name in names)


def read_probe_set(source: str) -> ProbeSet:
    """Reads the probe files of a source, and makes every check that needs no model; arguments and errors are those of ``files_of``."""
    from probescore_server.errors import ProbeRefused
    from probescore_server.probes.format.probe_file import read_probe_file

    found: dict[str, ProbeFile] = {}
    refused = []
    for file in files_of(source):
        try:
            probe = read_probe_file(file)
        except ProbeRefused as error:
            refused.append(error)
            continue
        first = found.setdefault(probe.manifest.key, probe)
        if first.manifest != probe.manifest:
            problem = f"{probe.manifest.key} with other content than in {first.file}"
            refused.append(ProbeRefused(file, "version", problem, "a version of its own for each content"))
    probes = sorted(found.values(), key=lambda probe: (probe.manifest.name, version_order(probe.manifest.version)))
    return ProbeSet(tuple(probes), tuple(refused))
