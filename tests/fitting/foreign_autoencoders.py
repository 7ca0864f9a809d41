"""A sparse autoencoder of the tiny model, in the files of SAELens 6."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from models import HIDDEN_SIZE
from numpy.typing import NDArray
from safetensors.torch import save_file

D_SAE = 24


def autoencoder(folder: Path, hook: str, direction: NDArray | None = None) -> tuple[Path, Callable[[NDArray], NDArray]]:
    """The folder, and its formula; with a direction, one feature reads it and the others read noise."""
    random = np.random.default_rng(0)
    enc, dec = (random.standard_normal(shape) / np.sqrt(HIDDEN_SIZE) for shape in ((HIDDEN_SIZE, D_SAE), (D_SAE, HIDDEN_SIZE)))
    b_enc, b_dec = random.standard_normal(D_SAE) * 0.1, random.standard_normal(HIDDEN_SIZE) * 0.1
    if direction is not None:
        enc[:, 5] = direction
    folder.mkdir()
    weights = {"W_enc": enc, "b_enc": b_enc, "W_dec": dec, "b_dec": b_dec}
    save_file({name: torch.tensor(array, dtype=torch.float32) for name, array in weights.items()}, folder / "sae_weights.safetensors")
    config = {
        "architecture": "standard",
        "d_in": HIDDEN_SIZE,
        "d_sae": D_SAE,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": hook, "prepend_bos": True, "sae_lens_version": "6.1.0"},
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder, lambda rows: np.maximum((rows - b_dec) @ enc + b_enc, 0)
