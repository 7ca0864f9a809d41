"""Checks that a model's files do not change while they are loaded, and computes one digest of everything that was loaded from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from probescore_server.backbone.model_loading import Decoder
from probescore_server.errors import ModelRefused
from probescore_server.files import UnreadableFile, kind_of, read_regular_file

MAX_SMALL_FILE_BYTES = 1 << 30

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_SMALL = (
    "config.json", "adapter_config.json", "*.py",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "*.jinja", "chat_template*", "additional_chat_templates/*",
)  # fmt: skip

_Stamp = tuple[int, int, int, int]

# For checksums: words are weighted by odd numbers that depend on their place, so that a change of any single word changes the sum.
_CHUNK_WORDS = 1 << 22
_MULTIPLIER = 0x9E3779B97F4A7C15
_MODULUS = 1 << 64


@dataclass(frozen=True)
class ModelFiles:
    """Records the files of a model that determine its computation and its tokenisation, as they were at one moment.

    Attributes:
        directory: the model's directory.
        stamps: by path, the file's device, inode, size in bytes and time of last change in nanoseconds.
    """

    directory: Path
    stamps: dict[Path, _Stamp]

    @classmethod
    def of(cls, directory: Path) -> ModelFiles:
        """Records the files of a directory as they are now.

        Raises:
            ModelRefused: one of them is neither a regular file nor a directory, such as a pipe, which could block a read for ever.
        """
        return cls(directory, {path: _stamp(path) for path in _files(directory, _WEIGHTS + _SMALL)})

    def check_unchanged(self) -> None:
        """Checks that no file of the model was written, replaced, added or removed since the files were recorded.

        Raises:
            ModelRefused: a file has changed; the error names up to five of them.
        """
        now = ModelFiles.of(self.directory)
        changed = sorted({path.name for path, _ in now.stamps.items() ^ self.stamps.items()})
        if changed:
            raise ModelRefused(f"{self.directory.name}: {', '.join(changed[:5])} changed while the model was loaded")

    def digest(self, decoder: Decoder) -> str:
        """Returns ``sha256:…`` over every weight that is loaded and every byte of the small files; it is the same on every device.

        Args:
            decoder: the model as loaded, before anything in it is changed for speed.

        Raises:
            ModelRefused: a file cannot be read.
        """
        content = {
            "files": {str(path.relative_to(self.directory)): _sha256(path) for path in _files(self.directory, _SMALL)},
            "weights": {
                name: (str(weight.dtype), list(weight.shape), _checksum(weight)) for name, weight in decoder.model.state_dict().items()
            },
        }
        return "sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files(directory: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    found = {path for pattern in patterns for path in directory.glob(pattern)}
    for path in sorted(found):
        kind = kind_of(path)
        if kind not in ("", "a directory"):
            raise ModelRefused(f"{directory.name}: {path.name} is {kind}, not a regular file")
        if path.is_file():
            yield path


def _stamp(path: Path) -> _Stamp:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(read_regular_file(path, MAX_SMALL_FILE_BYTES)).hexdigest()
    except UnreadableFile as error:
        raise ModelRefused(f"{path.name}: {error}") from None


@torch.inference_mode()
def _checksum(weight: torch.Tensor) -> int:
    """Returns an integer checksum of a weight's bytes, which depends on their order. It is computed on the weight's device."""
    content = weight.detach().contiguous().view(-1).view(torch.uint8)
    content = content.clone() if content.storage_offset() % 8 else content
    whole = len(content) - len(content) % 8
    words = [content[:whole].view(torch.int64), content[whole:].to(torch.int64)]
    places = torch.arange(1, 2 * min(_CHUNK_WORDS, max(map(len, words))), 2, device=weight.device)
    sums = [(chunk * places[: len(chunk)]).sum() for part in words for chunk in torch.split(part, _CHUNK_WORDS)]
    checksum = len(content)
    for chunk in torch.stack(sums).tolist():
        checksum = (checksum * _MULTIPLIER + chunk) % _MODULUS
    return checksum
