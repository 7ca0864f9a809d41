"""Files of other libraries, read into arrays. Nothing in them is run: pickles are opened only where that is asked for, elsewhere."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
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
_COMPRESSED = (b"x\x9c", b"x\x01", b"x\xda", b"\x1f\x8b", b"BZh", b"\xfd7zXZ")
_PICKLES = (".pkl", ".pickle", ".joblib", ".dill", ".lgprobe")


class ProbeSource:
    """A file, or a folder of files, that another library wrote.

    Args:
        path: of either.

    Attributes:
        path: as it was given.
        kind: what its bytes are, whatever its name.
        folder: the folder itself, or that of the file.

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.kind = _kind(self.path)
        self.folder = self.path if self.kind == "folder" else self.path.parent

    @property
    def name(self) -> str:
        """The name of the file or folder, for messages."""
        return self.path.name or str(self.path)

    def holds(self, *names: str) -> bool:
        """Tells whether the source is a folder with these files, or one of these files beside the others."""
        return (self.kind == "folder" or self.path.name in names) and all((self.folder / name).is_file() for name in names)

    def beside(self, *names: str) -> list[str]:
        """Returns those of some files that lie in the folder."""
        return [name for name in names if (self.folder / name).is_file()]

    def member(self, name: str) -> ProbeSource:
        """Opens a file of the folder."""
        return ProbeSource(self.folder / name)

    def config(self, name: str) -> dict[str, Any]:
        """Reads a JSON object in the folder.

        Raises:
            ValueError: it is none.
        """
        try:
            content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name}: cannot be read as JSON ({type(error).__name__}); copy it again from where the probe was saved"
            ) from None
        if not isinstance(content, dict):
            raise ValueError(f"{name}: {arguments.kind_of(content)}; it should hold one JSON object")
        return content

    @cached_property
    def stand_ins(self) -> tuple[str, ...]:
        """Names of a torch file that stand for something else than numbers; a stand-in that does nothing takes their place."""
        if self.kind != "torch":
            return ()
        try:
            return tuple(torch.serialization.get_unsafe_globals_in_checkpoint(self.path))
        except Exception:  # of an older format, which torch reads only strictly
            return ()

    @cached_property
    def content(self) -> Any:  # noqa: ANN401  what torch or numpy makes of it
        """The content of the file: an array, or whatever torch holds, tensors with the names of their mappings.

        Raises:
            ValueError: it is no such file, it is damaged, or it needs code to be run.
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
        """The file's tensors by name, float64; the one array of a file without names is ``""``.

        Raises:
            ValueError: it holds none, or numbers that are not finite.
        """
        return tensors(self.content, self.name)


def tensors(content: object, where: str) -> dict[str, NDArray[np.float64]]:
    """Returns the tensors of a mapping by name, or a single one as ``""``, in float64; whatever else the mapping holds is left out.

    Raises:
        ValueError: there is none, or one holds numbers that are not finite.
    """
    found = {}
    for name, value in (content if isinstance(content, Mapping) else {"": content}).items():
        if isinstance(value, (torch.Tensor, np.ndarray)) and value.dtype not in (torch.bool, np.dtype(bool)):
            argument = f"{where}: {name}" if name else where
            found[str(name)] = arguments.numbers(value, argument, "finite numbers") if _count(value) else np.zeros(tuple(value.shape))
    if not found:
        raise ValueError(f"{where}: {arguments.kind_of(content)} without tensors; give a file with the probe's weights")
    return found


def taken(found: Mapping[str, NDArray[np.float64]], name: str, where: str, *shape: int | None) -> NDArray[np.float64]:
    """Returns a tensor that must have a certain shape.

    Args:
        found: tensors by name.
        name: which.
        where: the file, for messages.
        shape: a number, or ``None`` for any, for each axis.

    Raises:
        ValueError: it is not there, or has another shape.
    """
    if name not in found:
        raise ValueError(f"{where}: {name}: not there (it has {', '.join(sorted(found)[:12]) or 'nothing'}); is it of another format?")
    array = found[name]
    if len(array.shape) != len(shape) or any(wanted not in (None, size) for wanted, size in zip(shape, array.shape, strict=True)):
        wanted_shape = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{where}: {name}: shape {array.shape}; expected ({wanted_shape}): is it for another model, or of another format?")
    return array


def whole_number(config: dict[str, object], key: str, where: str) -> int:
    """Returns a whole number of a configuration.

    Raises:
        ValueError: it is not there, or is none.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}: {key}: {arguments.shown(value) if key in config else 'missing'}; it should be a whole number")
    return value


def _stand_in(*given: object) -> object:
    """Takes the place of whatever a file names beside tensors: does nothing, and is what it was made of last."""
    return given[-1] if given else None


def _count(value: Any) -> int:  # noqa: ANN401
    return int(np.prod(tuple(value.shape)))


def _kind(path: Path) -> Kind:
    try:
        if path.is_dir():
            return "folder"
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
    if (start[:1] == b"\x80" and start[1:2] <= b"\x05") or (start.startswith(_COMPRESSED) and path.suffix in _PICKLES):
        return "pickle"
    return "other"


def _kind_of_zip(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return "other"
    if any(name.endswith("data.pkl") for name in names):
        return "torch"
    if "schema.json" in names:
        return "skops"
    return "npz" if names and all(name.endswith(".npy") for name in names) else "other"
