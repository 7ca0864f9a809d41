"""Defines guard rails: limits, on by default, that keep a screen (removal of rollouts by a probe's score) or a penalty from harming the
training. Each use of a guard rail is counted in the metrics.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from probescore_adapters.signals import Floats

RAILS = ("clipped", "screening_breaker", "group_breaker", "degenerate_group", "penalty_too_small")
"""Names of the guard rails in the metrics that count how often each guard rail acted."""


@dataclass(frozen=True)
class GuardRails:
    """Value object with the limits on the effect of signals (rules from probe scores to rewards) on the rewards of a batch.

    Attributes:
        clip: maximum absolute value that a signal adds or subtracts per rollout (for ``dense`` signals: per token).
        max_screened_share: maximum share of a batch that may be removed. If a larger share is flagged (at or above the threshold), no
            rollout is removed, since training on the remaining rollouts collapses; the flagged rollouts get the lowest reward of the batch
            instead.
        max_screened_share_of_group: maximum share of one group that may be removed, with the same effect for the rollouts of that group.
        drop_degenerate_groups: whether a group of which screening leaves at most one rollout is removed as a whole; a single rollout has no
            other rollouts to compute an advantage from.
        check_penalty: whether to report when the rollouts that a penalty flags still have higher rewards than the others, which means that
            the gain from cheating exceeds the penalty.

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
    """Result of screening a batch of ``n`` rollouts, some of which a screen has flagged because of a probe's score.

    Attributes:
        removed: ``(n,)`` booleans, true = the rollout is not trained on.
        lowered: ``(n,)`` booleans, true = the rollout is flagged but kept, with the lowest reward of the batch.
        acted: number of times that each guard rail acted, a dictionary keyed by the guard rail's name.
    """

    removed: NDArray[np.bool_]
    lowered: NDArray[np.bool_]
    acted: dict[str, int] = field(default_factory=dict)


def screen(flagged: NDArray[np.bool_], groups: Sequence[Hashable], rails: GuardRails) -> Screened:
    """Decides which rollouts of a batch that a probe's score has flagged are removed from training.

    The limit on the share of the whole batch is checked first. Then, in each group, one of three things happens: the group is removed
    because too few rollouts are left, no rollout is removed because the group's limit is exceeded, or the flagged rollouts are removed.

    Args:
        flagged: ``(n,)`` booleans, true = the screen flags the rollout.
        groups: ``n`` keys, equal within a group. The guard rails of groups do not apply to a group of one rollout.
        rails: the guard rails, with their limits.
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
    """Returns by how much the mean penalty of the rollouts that a probe flags exceeds their gain: their mean task reward minus the mean
    task reward of the other rollouts.

    The result is NaN if no rollout or every rollout is flagged, since there is nothing to compare.

    Args:
        flagged: ``(n,)`` booleans.
        penalties: ``(n,)``, the numbers that are subtracted from rewards.
        task_rewards: ``(n,)``, the rewards without probes.
    """
    if not flagged.any() or flagged.all():
        return math.nan
    gain = task_rewards[flagged].mean() - task_rewards[~flagged].mean()
    return float(penalties[flagged].mean() - gain)
