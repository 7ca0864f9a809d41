"""Activations whose labels are as readable as they are made, for estimates whose truth is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probescore_audit import auroc
from probescore_probes.fitting.cross_validation import Features, Labels, Nested, nested, select
from probescore_probes.fitting.linear_kinds import fit_linear

WIDTH = 16
FRESH = 4000


@dataclass(frozen=True)
class Source:
    """Where examples are drawn from: layers that share half of their noise, as a residual stream does, with a broad peak of the signal.

    Attributes:
        signal: distance of the classes at the best layer, in standard deviations of the noise; 0 = labels that nothing tells.
        layers: number of layers.
        positives: share of the examples that are positive.
        per_group: examples in a group, which have one label and half of their noise in common.
    """

    signal: float
    layers: int = 12
    positives: float = 0.5
    per_group: int = 1

    def draw(self, groups: int, seed: int) -> tuple[Features, Labels]:
        random = np.random.default_rng(seed)
        group = np.repeat(np.arange(groups), self.per_group)
        positive = group < round(self.positives * groups)
        strengths = self.signal * np.exp(-0.5 * ((np.arange(self.layers) - 0.6 * self.layers) / (0.25 * self.layers)) ** 2)
        shared = self._noise(random, group)
        features: Features = {}
        for layer, strength in enumerate(strengths):
            rows = np.sqrt(0.5) * (shared + self._noise(random, group))
            rows[:, 0] += strength * positive
            features[f"resid_post.{layer}", "mean"] = rows.astype(np.float32)
        return features, Labels(positive, group, np.ones(len(group)))

    def _noise(self, random: np.random.Generator, group: np.ndarray) -> np.ndarray:
        own = random.standard_normal((len(group), WIDTH))
        if self.per_group == 1:
            return own
        return np.sqrt(0.5) * (own + random.standard_normal((int(group.max()) + 1, WIDTH))[group])


def estimate_and_truth(source: Source, groups: int, seed: int, kind: str) -> tuple[Nested, float]:
    """What nested cross-validation says of one draw, and what the probe that the same procedure fits to it has on fresh examples."""
    features, labels = source.draw(groups, seed)
    chosen = select(features, labels, kind=kind, seed=seed).chosen
    probe = fit_linear(kind, features[chosen.tap, chosen.pool], labels.positive, labels.weights, chosen.strength)
    fresh, of_fresh = source.draw(FRESH // source.per_group, 10**6 + seed)
    return nested(features, labels, kind=kind, seed=seed), auroc(probe.score(fresh[chosen.tap, chosen.pool]), of_fresh.positive)
