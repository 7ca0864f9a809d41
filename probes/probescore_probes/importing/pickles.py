"""Opens pickles, which can run code while they are opened, only if the user trusts them.

An untrusted pickle is refused with a message that lists the code which the pickle would run.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from probescore_probes.importing.source import ProbeSource

_SHOWN = 6
_MOST_BYTES = 2**30  # of a compressed pickle, of which only names are wanted
_JOBLIB_ARRAY = "joblib.numpy_pickle.NumpyArrayWrapper"

_COMPRESSIONS: dict[bytes, Callable[[io.BytesIO], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
    b"]\x00\x00": lzma.LZMAFile,
}


class RunsCode(UserWarning):
    """Warning that is given before a trusted pickle is opened; it says which functions and classes the pickle names and may run."""


@dataclass(frozen=True)
class PickledNames:
    """Value object with the functions and classes that a pickle would import and may call, found without running it.

    Attributes:
        names: full names, such as ``os.system``, in the order in which the pickle first asks for them.
        complete: whether the pickle was followed to its end; if not, it may name more.
    """

    names: tuple[str, ...]
    complete: bool

    def __str__(self) -> str:
        """Returns the first few of the names that a pickle would import, as text for a message."""
        shown = ", ".join(self.names[:_SHOWN])
        if len(self.names) > _SHOWN:
            shown += f" and {len(self.names) - _SHOWN} others"
        if not self.complete:
            shown += f"{' and perhaps more: ' if shown else ''}it cannot be followed to its end without running it"
        return shown or "nothing"


def unpickled(source: ProbeSource, trusted: bool, instead: str) -> tuple[object, tuple[str, ...]]:
    """Opens a pickle and returns the object in it, with notes for the manifest (description) in a probe's file: that the pickle's code ran,
    and the warnings of libraries that the pickle used.

    Before the pickle is opened, a warning of class ``RunsCode`` says which functions and classes the pickle names.

    Args:
        source: the file, written by ``pickle``, ``joblib`` or ``dill``.
        trusted: whether the pickle's code may run in this process.
        instead: advice for the error message on what the user can do without trusting the file.

    Raises:
        ValueError: the pickle is not trusted, or cannot be opened.
    """
    named = pickled_names(source)
    if not trusted:
        raise ValueError(
            f"{source.name}: a Python pickle, which runs code as it is opened: it names {named}; {instead}, or, if you trust whoever made "
            "it, give trust_pickle (--trust-pickle)"
        )
    import joblib  # comes with scikit-learn

    warnings.warn(f"{source.name}: runs the code of a pickle, which names {named}", RunsCode, stacklevel=2)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            content = joblib.load(source.path)
    except ModuleNotFoundError as error:
        raise ValueError(f"{source.name}: its pickle needs {error.name}, which is not installed here; install it, or {instead}") from None
    except Exception as error:  # whatever the pickle's own code raises
        raise ValueError(f"{source.name}: cannot be opened ({type(error).__name__}); {instead}") from error
    ran = f"Read from a pickle, whose code was run: {named}"
    return content, (ran, *(" ".join(str(warning.message).split()) for warning in caught))


def pickled_names(source: ProbeSource) -> PickledNames:
    """Lists the functions and classes that a pickle would import, by following its operations with placeholders, which do nothing, instead
    of the functions and classes.

    No code of the pickle is run. Its stack is followed exactly, so that a pickle cannot show other names than those that it would use.
    """
    follower: _Follower | None = None
    try:
        follower = _Follower(io.BytesIO(_unpacked(source.path.read_bytes())))
        follower.load()
    except Exception:  # whatever a damaged pickle, or one that relies on what its code does, leads to
        return PickledNames(tuple(dict.fromkeys(follower.names if follower else ())), complete=False)
    return PickledNames(tuple(dict.fromkeys(follower.names)), complete=True)


def _unpacked(data: bytes) -> bytes:
    """Returns the bytes of a pickle without the compression that ``joblib`` can apply to it.

    Raises:
        ValueError: the pickle is too large without its compression.
    """
    if data[:1] == b"x":
        unpacked = zlib.decompressobj().decompress(data, _MOST_BYTES + 1)
    else:
        opened = next((of for start, of in _COMPRESSIONS.items() if data.startswith(start)), io.BufferedReader)
        unpacked = opened(io.BytesIO(data)).read(_MOST_BYTES + 1)
    if len(unpacked) > _MOST_BYTES:
        raise ValueError(f"over {_MOST_BYTES:,} bytes")
    return unpacked


class _Nothing:
    """Placeholder for any function, class or object of a pickle whose operations are followed without running its code: it accepts every
    call and every state, and does nothing.
    """

    name = ""

    def __init__(self, *given: Any, **named: Any) -> None:  # noqa: ANN401
        self.given: Any = given

    def __call__(self, *given: Any, **named: Any) -> Any:  # noqa: ANN401
        made = _Nothing(*given)
        made.name = self.name
        return made

    def __setstate__(self, state: Any) -> None:  # noqa: ANN401
        self.state = state

    def append(self, item: Any) -> None:  # noqa: ANN401
        """Accepts and drops items that a pickle adds to an object of a list-like class; a placeholder stands for the object."""

    def extend(self, items: Any) -> None:  # noqa: ANN401
        """Accepts and drops items that a pickle adds to an object of a list-like class; a placeholder stands for the object."""

    def add(self, item: Any) -> None:  # noqa: ANN401
        """Accepts and drops an item that a pickle adds to an object of a set-like class; a placeholder stands for the object."""

    def __setitem__(self, key: Any, value: Any) -> None:  # noqa: ANN401
        """Accepts and drops an entry that a pickle sets in an object of a mapping-like class; a placeholder stands for the object."""


class _Follower(pickle._Unpickler):  # the one in Python, whose operations can be replaced
    """Unpickler that follows the operations of a pickle with placeholders, which run no code, and collects the names of the functions and
    classes that the pickle asks for.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    append: Callable[[Any], None]

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._file = file
        self.names: list[str] = []

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        full = f"{module}.{name}"
        self.names.append(full)
        placeholder = _Nothing()
        placeholder.name = full
        return placeholder

    def persistent_load(self, pid: Any) -> Any:  # noqa: ANN401
        return _Nothing(pid)

    def get_extension(self, code: int) -> None:
        self.names.append(f"extension {code} of copyreg")
        self.append(_Nothing())

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.stack[-1](*arguments)

    def load_newobj_ex(self) -> None:
        named, arguments = self.stack.pop(), self.stack.pop()
        self.stack[-1] = self.stack[-1](*arguments, **named)

    def _instantiate(self, klass: Any, arguments: Any) -> None:  # noqa: ANN401
        self.append(klass(*arguments))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        called = self.stack[-1]
        self.stack[-1] = called(*arguments) if isinstance(called, _Nothing) else _Nothing(*arguments)

    def load_build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, _Nothing):
            made.state = state
            if made.name == _JOBLIB_ARRAY:
                self._skip_array(state)

    def _skip_array(self, state: dict[str, Any]) -> None:
        """Skips the bytes of a numpy array, which ``joblib`` puts between the operations of a pickle. An array of Python objects is stored
        as another pickle, whose operations are followed instead.
        """
        dtype = np.dtype(str(state["dtype"].given[0]))
        if dtype.hasobject:
            inner = _Follower(self._file)
            inner.names = self.names
            inner.load()
            return
        if state.get("numpy_array_alignment_bytes") is not None:
            self._file.seek(self._file.read(1)[0], io.SEEK_CUR)
        size = int(np.prod([int(length) for length in state["shape"]], dtype=object)) * dtype.itemsize
        if len(self._file.read(size)) < size:
            raise ValueError("an array that ends early")

    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build
