"""Checks that a model's files do not change while they are loaded, and computes one digest of all loaded content."""

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
    """Value object with the state, at one moment, of the files that determine a model's computation and tokenisation.

    Attributes:
        directory: the model's directory.
        stamps: a dictionary, keyed by path, of the file's device number, inode, size in bytes and time of last change in nanoseconds.
    """

    directory: Path
    stamps: dict[Path, _Stamp]

    @classmethod
    def of(cls, directory: Path) -> ModelFiles:
        """Returns the current state of the files of a model's directory.

        Raises:
            ModelRefused: an entry of the directory is neither a regular file nor a directory. A pipe, for example, could block a read for
                ever.
        """
        return cls(directory, {path: _stamp(path) for path in _files(directory, _WEIGHTS + _SMALL)})

    def check_unchanged(self) -> None:
        """Checks that no file of the model was written, replaced, added or removed since the files were recorded.

        Raises:
            ModelRefused: files have changed; the error names up to five of them.
        """
        now = ModelFiles.of(self.directory)
        changed = sorted({path.name for path, _ in now.stamps.items() ^ self.stamps.items()})
        if changed:
            raise ModelRefused(f"{self.directory.name}: {', '.join(changed[:5])} changed while the model was loaded")

    def digest(self, decoder: Decoder, shallower: int = 0) -> dict[int, str]:
        """Returns a digest ``sha256:…`` of every loaded weight and of every byte of the model's other files; it is the same on every
        device.

        Args:
            decoder: the model as loaded, before anything in it is changed for speed.
            shallower: a number of blocks for which the digest is computed too, as if no more were loaded; 0 = none.

        Returns:
            The digests, keyed by the number of blocks.

        Raises:
            ModelRefused: a file cannot be read.
        """
        files = {str(path.relative_to(self.directory)): _sha256(path) for path in _files(self.directory, _SMALL)}
        weights = {name: (str(weight.dtype), list(weight.shape), _checksum(weight)) for name, weight in decoder.model.state_dict().items()}
        blocks = next(name for name, module in decoder.model.named_modules() if module is decoder.blocks)
        digests = {}
        for layers in {len(decoder.blocks), min(shallower, len(decoder.blocks)) or len(decoder.blocks)}:
            later = tuple(f"{blocks}.{layer}." for layer in range(layers, len(decoder.blocks)))
            content = {"files": files, "weights": {name: found for name, found in weights.items() if not name.startswith(later)}}
            digests[layers] = "sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return digests


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
    """Returns an integer checksum of a weight's bytes that also depends on the bytes' order. The checksum is computed on the weight's
    device.
    """
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
