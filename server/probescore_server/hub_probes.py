"""Downloads probe files from repositories on the Hugging Face hub, which are named ``hf:ORGANISATION/REPOSITORY[@REVISION][:FILE]``.

A branch or tag is resolved to a commit first, so that every file is of one state of the repository, which can be named again. Only files
that end with ``.onnx``, and the adapters beside them, are downloaded, and nothing of them is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from probescore_server.errors import ProbeRefused
from probescore_server.files import MAX_ADAPTER_BYTES, MAX_PROBE_FILE_BYTES, adapter_path

PREFIX = "hf:"
FORM = "hf:ORGANISATION/REPOSITORY[@REVISION][:FILE.onnx]"

_NAME = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^\s:@]+))?(?::(?P<file>[^\s:]+\.onnx))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SECONDS = 30.0
_DOWNLOAD = "download the file, and give its path"


@dataclass(frozen=True)
class HubProbes:
    """Reference to one probe file, or to all probe files, of a repository on the Hugging Face hub.

    Attributes:
        repository: ``organisation/repository``.
        revision: branch, tag or commit; empty = the default branch.
        file: one file's path in the repository; empty = every file that ends with ``.onnx``.
        brings_adapter: whether an adapter lies beside the file; ``None`` = not known.
    """

    repository: str
    revision: str = ""
    file: str = ""
    brings_adapter: bool | None = field(default=None, compare=False)

    @property
    def adapter(self) -> str:
        """Returns the path in the repository where the adapter of the probe file lies, if the probe brings one."""
        return adapter_path(self.file).as_posix()

    @classmethod
    def parse(cls, name: str) -> HubProbes:
        """Parses the name of probe files on the Hugging Face hub, ``hf:ORGANISATION/REPOSITORY[@REVISION][:FILE.onnx]``.

        Raises:
            ProbeRefused: the name has another form.
        """
        found = _NAME.fullmatch(name)
        if found is None or ".." in PurePosixPath(found["file"] or "").parts or (found["file"] or "").startswith("/"):
            raise ProbeRefused(name, "name", "another form", FORM)
        return cls(found["repository"], found["revision"] or "", found["file"] or "")

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}{self.revision and f'@{self.revision}'}{self.file and f':{self.file}'}"

    @property
    def has_commit(self) -> bool:
        """Returns whether the revision of a repository on the hub is stated as a full commit hash, which, unlike a branch, always means the
        same files.
        """
        return _COMMIT.fullmatch(self.revision) is not None

    def pinned(self) -> tuple[HubProbes, ...]:
        """Asks the Hugging Face hub for the commit to which the revision (a branch or tag) points now, and returns each probe file that is
        meant, named with this commit.

        Raises:
            ProbeRefused: the hub cannot be reached, or has no such repository, revision or file; or a file is too large.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            found = HfApi().model_info(self.repository, revision=self.revision or None, files_metadata=True, timeout=_SECONDS)
        except GatedRepoError:
            raise ProbeRefused(str(self), "repository", "one that is gated", "an accepted licence, and a token of it in HF_TOKEN") from None
        except RevisionNotFoundError:
            raise ProbeRefused(str(self), "revision", f"no {self.revision}", "a branch, tag or commit of the repository") from None
        except RepositoryNotFoundError:
            expected = "one of the hub; for a private one, a token in HF_TOKEN"
            raise ProbeRefused(str(self), "repository", "no such repository", expected) from None
        except OfflineModeIsEnabled:
            raise self._unreachable("HF_HUB_OFFLINE is set") from None
        except HfHubHTTPError as error:
            raise self._unreachable(f"it answers {error.response.status_code}") from None
        except Exception as error:  # what a failed connection raises depends on the HTTP library of the hub's client
            raise self._unreachable(type(error).__name__) from None
        stored = {entry.rfilename: entry.size or 0 for entry in found.siblings or ()}
        sizes = {name: size for name, size in stored.items() if _is_probe_file(name)}
        names = [self.file] if self.file in sizes else [] if self.file else sorted(sizes)
        if not names:
            there = ", ".join(sorted(sizes)) or "no file that ends with .onnx"
            raise ProbeRefused(str(self), "file", there, self.file or "at least one")
        pinned = []
        for name in names:
            probe = replace(self, file=name)
            if sizes[name] > MAX_PROBE_FILE_BYTES:
                raise ProbeRefused(str(probe), "file size", f"{sizes[name]} bytes", f"at most {MAX_PROBE_FILE_BYTES}")
            if stored.get(probe.adapter, 0) > MAX_ADAPTER_BYTES:
                raise ProbeRefused(str(probe), "adapter", f"{stored[probe.adapter]} bytes", f"at most {MAX_ADAPTER_BYTES}")
            pinned.append(replace(probe, revision=str(found.sha), brings_adapter=probe.adapter in stored))
        return tuple(pinned)

    def path(self) -> Path:
        """Returns the path of the local copy of a probe file on the Hugging Face hub, which is downloaded if there is no copy yet, with the
        adapter beside it if there is one.

        Raises:
            ProbeRefused: the hub cannot be reached, or has no such file.
        """
        probe = self._cached(self.file)
        # Whoever downloads a probe file has its adapter first: where the file is and nothing else is known, there is no adapter to ask for.
        if (self.brings_adapter or (self.brings_adapter is None and probe is None)) and self._cached(self.adapter) is None:
            adapter = self._downloaded(self.adapter)
            if adapter is None and self.brings_adapter:
                raise self._missing(self.adapter)
        probe = probe or self._downloaded(self.file)
        if probe is None:
            raise self._missing(self.file)
        return probe

    def _cached(self, file: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.repository, file, revision=self.revision)
        return Path(cached) if isinstance(cached, str) else None

    def _downloaded(self, file: str) -> Path | None:
        """Returns the path of the local copy of a file of the repository, after a download; ``None`` = the commit has no such file.

        Raises:
            ProbeRefused: the hub cannot be reached.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined] # it is documented

        disable_progress_bars()  # they would stand among the lines of a server's log
        try:
            return Path(hf_hub_download(self.repository, file, revision=self.revision, etag_timeout=_SECONDS))
        except (RemoteEntryNotFoundError, RevisionNotFoundError, RepositoryNotFoundError):
            return None
        except LocalEntryNotFoundError:
            raise self._unreachable("it is not in the local cache") from None
        except Exception as error:  # what a failed connection raises depends on the HTTP library of the hub's client
            raise self._unreachable(type(error).__name__) from None

    def _missing(self, file: str) -> ProbeRefused:
        return ProbeRefused(str(self), "file", f"no such file of this commit: {file}", "one of the hub")

    def _unreachable(self, why: str) -> ProbeRefused:
        named = f"{PREFIX}{self.repository}@COMMIT:FILE.onnx"
        expected = f"a connection to it; without one, name what was downloaded before as {named}, or {_DOWNLOAD}"
        return ProbeRefused(str(self), "hub", f"that it cannot be reached ({why})", expected)


def _is_probe_file(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix == ".onnx" and not path.is_absolute() and ".." not in path.parts


def pinned_names(names: Sequence[str]) -> tuple[str, ...]:
    """Returns names of probe files, in which the name of each file on the Hugging Face hub states its commit; local paths stay as they are.

    Raises:
        ProbeRefused: the hub cannot be reached, or has no such repository, revision or file; or a file is too large.
    """
    return tuple(str(each) for name in names for each in (_pinned(name) if name.startswith(PREFIX) else (name,)))


def local_paths(names: Sequence[str], report: Callable[[str], None]) -> tuple[str, ...]:
    """Returns the local paths of probe files. Files on the Hugging Face hub are downloaded first; paths that are local already stay as they
    are.

    Args:
        names: paths of files and directories, and names that begin with ``hf:``.
        report: function that is called with the full name of each file on the hub, its commit included.

    Raises:
        ProbeRefused: the hub cannot be reached, or has no such repository, revision or file.
    """
    paths: list[str] = []
    for name in names:
        if not name.startswith(PREFIX):
            paths.append(name)
            continue
        for file in _pinned(name):
            paths.append(str(file.path()))
            report(str(file))
    return tuple(paths)


def local_file(name: str, report: Callable[[str], None]) -> str:
    """Returns the local path of one probe file, which is downloaded first if its name begins with ``hf:`` (a file on the Hugging Face hub).

    Raises:
        ProbeRefused: the hub cannot be reached, or has no such file; or the repository has several probe files and the name states none.
    """
    if not name.startswith(PREFIX):
        return name
    found = _pinned(name)
    if len(found) > 1:
        raise ProbeRefused(name, "file", ", ".join(each.file for each in found), f"one of them: {name}:{found[0].file}")
    (path,) = local_paths([str(found[0])], report)
    return path


def _pinned(name: str) -> tuple[HubProbes, ...]:
    """Returns each probe file that a name beginning with ``hf:`` stands for, with its commit. The Hugging Face hub is asked for the commit
    and the files unless the name states both.
    """
    probes = HubProbes.parse(name)
    return (probes,) if probes.has_commit and probes.file else probes.pinned()
