"""Keeps a screen or a penalty from doing harm, by guard rails that are on by default and counted when they act."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from probescore_adapters.signals import Floats

RAILS = ("clipped", "screening_breaker", "group_breaker", "degenerate_group", "penalty_too_small")
"""Are the names under which it is counted that a guard rail acted."""


@dataclass(frozen=True)
class GuardRails:
    """Sets the limits beyond which a signal is kept from acting on rewards as it would.

    Attributes:
        clip: what a signal adds or subtracts is at most this, per rollout (``dense``: per token).
        max_screened_share: of a batch. If more is flagged nothing is removed, since training on what is left collapses; the flagged
            rollouts get the lowest reward of the batch instead.
        max_screened_share_of_group: the same for the rollouts of one group.
        drop_degenerate_groups: a group of which screening leaves one rollout, or none, is removed whole: one alone has no advantage over
            others.
        check_penalty: report when rollouts that a penalty flags still come out ahead of the batch: what cheating gains exceeds the penalty.

    Raises:
        ValueError: a share is not in [0, 1], or ``clip`` is not a finite number above 0.
    """

    clip: float = 10.0
    max_screened_share: float = 0.5
    max_screened_share_of_group: float = 0.75
    drop_degenerate_groups: bool = True
    check_penalty: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise ValueError(f"clip must be a finite number above 0, got {self.clip}")
        for name in ("max_screened_share", "max_screened_share_of_group"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Screened:
    """Says what becomes of the ``n`` rollouts of a batch, some of which a screen flags.

    Attributes:
        removed: ``(n,)``, not trained on.
        lowered: ``(n,)``, flagged but kept, with the lowest reward of the batch.
        acted: how often each rail acted.
    """

    removed: NDArray[np.bool_]
    lowered: NDArray[np.bool_]
    acted: dict[str, int] = field(default_factory=dict)


def screen(flagged: NDArray[np.bool_], groups: Sequence[Hashable], rails: GuardRails) -> Screened:
    """Decides which of the rollouts that a screen flags are removed from training.

    The batch's breaker comes first; then in each group either too few are left, or the group's breaker acts, or the flagged are removed.

    Args:
        flagged: ``(n,)``.
        groups: ``n`` keys, equal within a group. A group of one has nobody to be compared with, and no rail.
        rails: the limits.
    """
    removed, lowered = flagged.copy(), np.zeros_like(flagged)
    if flagged.size and flagged.mean() > rails.max_screened_share:
        return Screened(lowered, removed, {"screening_breaker": 1})
    members: dict[Hashable, list[int]] = {}
    for index, key in enumerate(groups):
        members.setdefault(key, []).append(index)
    acted = {"group_breaker": 0, "degenerate_group": 0}
    for group in members.values():
        of_group = flagged[group]
        if len(group) == 1 or not of_group.any():
            continue
        if rails.drop_degenerate_groups and len(group) - of_group.sum() <= 1:
            removed[group] = True
            acted["degenerate_group"] += 1
        elif of_group.mean() > rails.max_screened_share_of_group:
            lowered[group] = of_group
            removed[group] = False
            acted["group_breaker"] += 1
    return Screened(removed, lowered, acted)


def penalty_margin(flagged: NDArray[np.bool_], penalties: Floats, task_rewards: Floats) -> float:
    """Returns by how much the mean penalty of the flagged rollouts exceeds what they gain: their mean task reward above that of the rest.

    NaN if none is flagged, or all are: then there is nothing to compare.

    Args:
        flagged: ``(n,)``.
        penalties: ``(n,)``, what is subtracted.
        task_rewards: ``(n,)``.
    """
    if not flagged.any() or flagged.all():
        return math.nan
    gain = task_rewards[flagged].mean() - task_rewards[~flagged].mean()
    return float(penalties[flagged].mean() - gain)
