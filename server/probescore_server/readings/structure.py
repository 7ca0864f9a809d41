"""Says which modules the whole of a decoder has, also those that are not loaded, and where the names in training's files lead."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from probescore_server.backbone.model_loading import Decoder, in_float32
from probescore_server.probes.format.fingerprints import without_wrappers

_FINAL_NORM = re.compile(r"norm|ln_f|norm_f|final_norm|final_layer_?norm")
# What wraps modules while they are trained: FSDP, torch.compile, activation checkpointing, DDP.
_TRAINING_WRAPPERS = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}


@dataclass(frozen=True, eq=False)
class DecoderStructure:
    """Value object with the modules of a whole decoder.

    Attributes:
        whole: the decoder with all its blocks, without memory for weights.
        blocks: name of the list of blocks, such as ``layers``.
        depth: number of blocks that are loaded.
        num_blocks: number of blocks of the whole decoder.
    """

    whole: nn.Module
    blocks: str
    depth: int
    num_blocks: int

    @classmethod
    def of(cls, decoder: Decoder) -> DecoderStructure:
        """Returns the structure of the whole model of which a decoder has the first blocks."""
        with torch.device("meta"):
            whole = type(decoder.model)(in_float32(decoder.config))
        blocks = next(name for name, module in decoder.model.named_modules() if module is decoder.blocks)
        return cls(whole, blocks, len(decoder.blocks), decoder.num_hidden_layers)

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """Returns the modules of the whole decoder by their names in it."""
        return dict(self.whole.named_modules())

    @cached_property
    def _by_bare_name(self) -> Mapping[str, str]:
        return {without_wrappers(name): name for name in self.modules if name}

    def find(self, written: str) -> str | None:
        """Returns the name in the decoder of a module by the name in a file, which may have wrappers before it; ``None`` if there is none.

        Args:
            written: the name in the file, without what training's wrappers add (``name_as_trained``).
        """
        return self._by_bare_name.get(without_wrappers(written))

    def shape_of(self, written: str) -> torch.Size | None:
        """Returns the shape of a parameter of the decoder by the name in a file; ``None`` if there is none of that name, as where
        transformers joins tensors of a file.
        """
        path, _, attribute = written.rpartition(".")
        module = self.find(path)
        parameter = None if module is None else self.modules[module]._parameters.get(attribute)
        return None if parameter is None else parameter.shape

    def layer_of(self, name: str) -> int | None:
        """Returns the index of the block in which a module or tensor of the decoder lies; ``None`` if it lies in no block."""
        start = f"{self.blocks}."
        return int(name.removeprefix(start).split(".")[0]) if name.startswith(start) else None

    def is_final_norm(self, name: str) -> bool:
        """Returns whether a module of the decoder, by name, is the norm after the last block."""
        return self.layer_of(name) is None and _FINAL_NORM.fullmatch(without_wrappers(name)) is not None

    def is_seen(self, name: str) -> bool:
        """Returns whether a probe may see what a module of the decoder computes, today or once other probes are served: it is loaded, and
        so is all that comes before it.
        """
        layer = self.layer_of(name)
        if self.is_final_norm(name):
            return self.depth == self.num_blocks
        return layer is None or layer < self.depth


def name_as_trained(written: str) -> str:
    """Returns a module's name in a file without what training's wrappers add: the name that the module had in the model that was
    trained.
    """
    parts = [part for part in written.split(".") if part not in _TRAINING_WRAPPERS]
    if parts[:1] == ["module"]:
        del parts[0]
    return ".".join(parts)
