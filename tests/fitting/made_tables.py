"""Made tables of activations, which no model is needed for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from probescore_probes.fitting.activation_pass import ActivationTable

TAPS = ("resid_post.0", "resid_post.1", "resid_post.2")


def table_of(tokens: dict[str, list[NDArray[np.float32]]], features: int = 0) -> ActivationTable:
    """The table of rollouts whose tokens' activations are given by tap, with what pooling makes of them; features are of the last tap."""
    count = len(next(iter(tokens.values())))
    pooled = {
        (tap, pool): np.stack([each.mean(axis=0) if pool == "mean" else each[-1] for each in rows]).astype(np.float32)
        for tap, rows in tokens.items()
        for pool in ("mean", "last")
    }
    unknown = np.full(count, np.nan)
    last = [np.maximum(each[:, :features], 0) for each in tokens[list(tokens)[-1]]]
    return ActivationTable(
        tuple(tokens),
        ("mean", "last"),
        pooled,
        unknown,
        np.zeros(count, np.int64),
        dict.fromkeys(tokens, unknown),
        tokens={tap: tuple(rows) for tap, rows in tokens.items()},
        features={"mean": np.stack([each.mean(0) for each in last]), "max": np.stack([each.max(0) for each in last])} if features else {},
    )
