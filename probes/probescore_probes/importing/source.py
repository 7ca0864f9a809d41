"""Reads files of other libraries into arrays, without running any code in the files.

Pickles that need code are opened elsewhere, in ``pickles``, and only if the user trusts them.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from probescore_probes import arguments

Kind = Literal["folder", "torch", "safetensors", "npy", "npz", "onnx", "skops", "pickle", "other"]

_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LARGE_ARCHIVE = 2**30
_MOST_COMPRESSED = 20
_PICKLES = (".pkl", ".pickle", ".joblib", ".dill", ".lgprobe")


class ProbeSource:
    """A file, or a folder of files, that another library wrote.

    Args:
        path: path of the file or folder.

    Attributes:
        path: the path as it was given.
        kind: format of the file, recognised by its bytes and not by its name.
        folder: the folder itself, or the folder that holds the file.

    Raises:
        ValueError: there is no such file, or the file cannot be read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.kind = _kind(self.path)
        self.folder = self.path if self.kind == "folder" else self.path.parent

    @property
    def name(self) -> str:
        """Returns the name of the file or folder that another library wrote, for messages."""
        return self.path.name or str(self.path)

    def holds(self, *names: str) -> bool:
        """Returns whether the given file names all exist in the folder of a probe that another library saved, and the path that the user
        gave is that folder or one of these files.
        """
        return (self.kind == "folder" or self.path.name in names) and all((self.folder / name).is_file() for name in names)

    def beside(self, *names: str) -> list[str]:
        """Returns those of the given file names that exist in the folder of a probe that another library saved."""
        return [name for name in names if (self.folder / name).is_file()]

    def member(self, name: str) -> ProbeSource:
        """Opens a file, given by its name, in the folder of a probe that another library saved."""
        return ProbeSource(self.folder / name)

    def config(self, name: str) -> dict[str, Any]:
        """Reads a JSON object from a file in the folder of a probe that another library saved.

        Raises:
            ValueError: the file does not hold a JSON object.
        """
        try:
            content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{name}: cannot be read as JSON ({type(error).__name__}); copy it again from where the probe was saved"
            ) from None
        if not isinstance(content, dict):
            raise ValueError(f"{name}: {arguments.kind_of(content)}; it should hold one JSON object")
        return content

    @cached_property
    def stand_ins(self) -> tuple[str, ...]:
        """Returns the names of classes that a torch file refers to beside tensors; when the file is read, a placeholder that runs nothing
        replaces each class.
        """
        if self.kind != "torch":
            return ()
        try:
            return tuple(torch.serialization.get_unsafe_globals_in_checkpoint(self.path))
        except Exception:  # of an older format, which torch reads only strictly
            return ()

    @cached_property
    def content(self) -> Any:  # noqa: ANN401  what torch or numpy makes of it
        """Returns the content of a probe's file: an array, or the object that torch saved, with its tensors in mappings by name.

        Raises:
            ValueError: the format is not known, the file is damaged, or reading it would run code.
        """
        try:
            match self.kind:
                case "torch":
                    with torch.serialization.safe_globals([(_stand_in, name) for name in self.stand_ins]):
                        return torch.load(self.path, map_location="cpu", weights_only=True)
                case "safetensors":
                    return load_file(self.path)
                case "npy":
                    return np.load(self.path, allow_pickle=False)
                case "npz":
                    with np.load(self.path, allow_pickle=False) as archive:
                        return {name: archive[name] for name in archive.files}
        except Exception as error:  # whatever the readers raise on damaged files, or on objects in place of numbers
            if self.stand_ins:
                raise ValueError(
                    f"{self.name}: holds Python objects of {', '.join(self.stand_ins[:5])}, which only code can make, and no code of a "
                    "file is run; save a state_dict() or plain tensors instead"
                ) from None
            raise ValueError(
                f"{self.name}: cannot be read ({type(error).__name__}): damaged, or of Python objects; save plain tensors"
            ) from None
        raise ValueError(f"{self.name}: no file of numbers; give .pt, .safetensors, .npy or .npz")

    @cached_property
    def tensors(self) -> dict[str, NDArray[np.float64]]:
        """Returns the tensors of a probe's file by name, as float64; a single array without a name gets the name ``""``.

        Raises:
            ValueError: the file holds no tensors, or a tensor holds NaN or an infinity.
        """
        return tensors(self.content, self.name)


def tensors(content: object, where: str) -> dict[str, NDArray[np.float64]]:
    """Returns the tensors of a mapping by name, as float64; a single tensor has the name ``""``. Other entries of the mapping are left out.

    Raises:
        ValueError: there is no tensor, or a tensor holds NaN or an infinity.
    """
    found = {}
    for name, value in (content if isinstance(content, Mapping) else {"": content}).items():
        if isinstance(value, (torch.Tensor, np.ndarray)) and value.dtype not in (torch.bool, np.dtype(bool)):
            argument = f"{where}: {name}" if name else where
            try:
                found[str(name)] = arguments.numbers(value, argument, "finite numbers") if _count(value) else np.zeros(tuple(value.shape))
            except TypeError as error:  # of complex numbers, or of text
                raise ValueError(str(error)) from None
    if not found:
        raise ValueError(f"{where}: {arguments.kind_of(content)} without tensors; give a file with the probe's weights")
    return found


def taken(found: Mapping[str, NDArray[np.float64]], name: str, where: str, *shape: int | None) -> NDArray[np.float64]:
    """Returns the tensor of a given name after checking its shape.

    Args:
        found: tensors by name.
        name: name of the tensor.
        where: name of the file, for messages.
        shape: the expected length of each axis; ``None`` for an axis of any length.

    Raises:
        ValueError: the tensor is missing or has another shape.
    """
    if name not in found:
        raise ValueError(f"{where}: {name}: not there (it has {', '.join(sorted(found)[:12]) or 'nothing'}); is it of another format?")
    array = found[name]
    if len(array.shape) != len(shape) or any(wanted not in (None, size) for wanted, size in zip(shape, array.shape, strict=True)):
        wanted_shape = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{where}: {name}: shape {array.shape}; expected ({wanted_shape}): is it for another model, or of another format?")
    return array


def nothing_more(found: Iterable[str], known: Iterable[str], where: str, what: str) -> None:
    """Checks that a probe's file has no tensors beside those that a formula uses, since a further tensor means that the probe's author
    computes its scores by another formula.

    Args:
        found: names of the file's tensors.
        known: names of the tensors that the formula uses, or that do not change the scores.
        where: name of the file, for messages.
        what: name of the kind of probe, for messages.

    Raises:
        ValueError: there are other tensors.
    """
    if others := sorted({*found} - {*known}):
        raise ValueError(
            f"{where}: {', '.join(others[:4])}: no part of {what}, whose scores would be others with it; give the format that it is of, or "
            "write its formula as a torch module and use torch_probe"
        )


def number_in(found: Mapping[str, NDArray[np.float64]], name: str, where: str, default: float) -> float:
    """Returns the number that the tensor of a given name holds, or the default if there is no such tensor.

    Raises:
        ValueError: the tensor holds several numbers, or none.
    """
    if name not in found:
        return default
    if found[name].size != 1:
        raise ValueError(f"{where}: {name}: shape {found[name].shape}; expected one number: is it of another format?")
    return float(found[name].item())


def settings_in(config: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """Returns the JSON object that a configuration holds under a key; an empty dictionary if the entry is missing or null.

    Raises:
        ValueError: the entry is not a JSON object.
    """
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {key}: {arguments.shown(value)}; it should be an object")
    return value


def flag_in(config: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    """Returns the boolean that a configuration holds under a key; the default if the entry is missing or null.

    Raises:
        ValueError: the entry is neither true nor false.
    """
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {key}: {arguments.shown(value)}; it should be true or false")
    return value


def one_of(config: Mapping[str, Any], key: str, where: str, known: Sequence[str], default: str) -> str:
    """Returns the name, such as that of an activation function, that a JSON configuration holds under a key, after a check that the name is
    a known one; the default if the entry is missing.

    Raises:
        ValueError: the entry is an unknown name, or is not text.
    """
    value = config.get(key, default)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{where}: {key}: {arguments.shown(value)}; only {', '.join(known[:-1])} and {known[-1]} can be imported")
    return value


def whole_number(config: Mapping[str, object], key: str, where: str) -> int:
    """Returns the whole number that a configuration holds under a key.

    Raises:
        ValueError: the entry is missing, or is not a whole number.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}: {key}: {arguments.shown(value) if key in config else 'missing'}; it should be a whole number")
    return value


def _stand_in(*given: object) -> object:
    """Stands for any class that a torch file names beside tensors, while the file is read: runs no code of the class, and returns the last
    argument that the file gives it.
    """
    return given[-1] if given else None


def _count(value: Any) -> int:  # noqa: ANN401
    return int(np.prod(tuple(value.shape)))


def _kind(path: Path) -> Kind:
    try:
        if path.is_dir():
            return "folder"
        if path.exists() and not path.is_file():
            raise ValueError(f"file: {str(path)!r} is a device, a pipe or a socket; give a probe's file or folder")
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise ValueError(
            f"file: {str(path)!r} cannot be read ({error.strerror or type(error).__name__}); give a probe's file or folder"
        ) from None
    if path.suffix == ".onnx":
        return "onnx"
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    if start.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    if start.startswith(_LEGACY_TORCH):
        return "torch"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return "safetensors"
    if (start[:1] == b"\x80" and start[1:2] <= b"\x05") or path.suffix in _PICKLES:  # compressed, or of an old protocol
        return "pickle"
    return "other"


def _kind_of_zip(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            whole = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError):  # of a damaged directory
        return "other"
    if whole > _LARGE_ARCHIVE and whole > _MOST_COMPRESSED * path.stat().st_size:
        raise ValueError(
            f"{path.name}: {path.stat().st_size:,} bytes that unpack to {whole:,}, as no weights do; save it again, without compression"
        )
    if any(name.endswith("data.pkl") for name in names):
        return "torch"
    if "schema.json" in names:
        return "skops"
    return "npz" if names and all(name.endswith(".npy") for name in names) else "other"
