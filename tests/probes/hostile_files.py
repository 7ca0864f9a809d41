"""Files of other libraries as damage, accidents and ill will leave them: each tensor and each entry of a configuration, wrong in many ways.

``hostile(folder)`` yields a name and a function that spoils the files in the folder in one way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from probescore_probes.importing.source import ProbeSource

Spoil = Callable[[], None]

TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "left out": lambda _: None,
    "empty": lambda t: t.new_zeros(0),
    "a scalar": lambda t: t.new_zeros(()) + 0.5,
    "with one axis more": lambda t: t[None].contiguous(),
    "flat": lambda t: t.reshape(-1).contiguous() if t.ndim > 1 else t.reshape(1, -1).contiguous(),
    "one row short": lambda t: t[:-1].contiguous() if t.ndim else t,
    "twice": lambda t: torch.cat([t, t]) if t.ndim else t,
    "of NaN": lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
    "with an infinity": lambda t: torch.full_like(t, float("inf")) if t.is_floating_point() else t,
    "of zeros": torch.zeros_like,
    "of the largest numbers": lambda t: torch.full_like(t, 3e38) if t.is_floating_point() else t,
    "of the smallest numbers": lambda t: torch.full_like(t, 1e-45) if t.is_floating_point() else t,
    "of booleans": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
}
ENTRIES: list[Any] = [None, True, -1, 0, 3, 10**9, 2.5, 1e300, float("nan"), "", "x", "1", [], ["a"], [-1], {}, {"a": 1}]


def hostile(folder: Path) -> Iterator[tuple[str, Spoil]]:
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if file.suffix == ".json":
            yield from _configurations(file)
        elif file.suffix == ".safetensors":
            yield from _tensors(file, load_file(file), lambda content, file=file: save_file(content, file))
        elif file.suffix in (".pt", ".bin", ".mmpprobe"):
            content = ProbeSource(file).content
            yield from _tensors(file, content, lambda content, file=file: torch.save(content, file))
        elif file.suffix in (".npy", ".npz"):
            yield from _arrays(file)
        yield from _bytes(file)


def _configurations(file: Path) -> Iterator[tuple[str, Spoil]]:
    config = json.loads(file.read_text())

    def without(place: dict[str, Any], key: str, path: str) -> Iterator[tuple[str, Spoil]]:
        yield f"{path} left out", lambda: _with(place, key, file, config, leave_out=True)
        for value in ENTRIES:
            yield f"{path} = {value!r}", lambda value=value: _with(place, key, file, config, value)
        if isinstance(place[key], dict):
            for inner in list(place[key]):
                yield from without(place[key], inner, f"{path}.{inner}")

    for key in list(config):
        yield from without(config, key, f"{file.name}: {key}")


def _with(place: dict[str, Any], key: str, file: Path, config: dict[str, Any], value: Any = None, leave_out: bool = False) -> None:
    was = place[key]
    try:
        if leave_out:
            del place[key]
        else:
            place[key] = value
        file.write_text(json.dumps(config))
    finally:
        place[key] = was


def _tensors(file: Path, content: Any, save: Callable[[Any], None]) -> Iterator[tuple[str, Spoil]]:
    if isinstance(content, torch.Tensor):
        for name, change in TENSORS.items():
            if (spoilt := change(content)) is not None:
                yield f"{file.name} {name}", lambda spoilt=spoilt: save(spoilt)
        return
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            for name, change in TENSORS.items():
                spoilt = change(value)
                changed = {k: v for k, v in content.items() if k != key} | ({} if spoilt is None else {key: spoilt})
                yield f"{file.name}: {key} {name}", lambda changed=changed: save(changed)
            continue
        if isinstance(value, dict):
            yield from _tensors(file, value, lambda inner, key=key: save(content | {key: inner}))
        if file.suffix != ".safetensors":
            yield f"{file.name}: {key} left out", lambda key=key: save({k: v for k, v in content.items() if k != key})
            for entry in ENTRIES:
                yield f"{file.name}: {key} = {entry!r}", lambda key=key, entry=entry: save(content | {key: entry})


def _arrays(file: Path) -> Iterator[tuple[str, Spoil]]:
    loaded = np.load(file)
    arrays = {"": loaded} if file.suffix == ".npy" else {name: loaded[name] for name in loaded.files}
    for key, array in arrays.items():
        for name, change in TENSORS.items():
            if (spoilt := change(torch.from_numpy(array.copy()))) is not None:

                def spoil(key: str = key, spoilt: torch.Tensor = spoilt) -> None:
                    np.save(file, spoilt.numpy()) if file.suffix == ".npy" else np.savez(file, **arrays | {key: spoilt.numpy()})

                yield f"{file.name}: {key} {name}", spoil


def _bytes(file: Path) -> Iterator[tuple[str, Spoil]]:
    content = file.read_bytes()
    for part in (0, 1, 9, len(content) // 3, len(content) - 1):
        yield f"{file.name} cut after {part} bytes", lambda part=part: file.write_bytes(content[:part])
    spoilt = bytearray(content)
    for place in range(0, len(spoilt), max(1, len(spoilt) // 20)):
        spoilt[place] ^= 0xFF
    yield f"{file.name} with bits turned", lambda: file.write_bytes(bytes(spoilt))
    yield f"{file.name} of brackets", lambda: file.write_text("[" * 200_000)
    yield f"{file.name} of zeros", lambda: file.write_bytes(bytes(4096))
