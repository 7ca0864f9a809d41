"""Prepares labelled rollouts for fitting: tokenises them, divides them into splits, and describes them for the file and the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from probescore_audit import Estimate, grouped_auroc
from probescore_probes.fitting.cross_validation import Labels
from probescore_probes.fitting.labelled_rollouts import CALIBRATION, OOD, TEST, TRAIN, Example, LabelledRollout, facts, tokenised
from probescore_probes.fitting.splits import Split, split
from probescore_server.engine.engine import Engine

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class FittingData:
    """The labelled examples that a probe is fitted and judged on, with their splits.

    Attributes:
        examples: all examples, those of other distributions last.
        labels: labels, groups and weights of all examples.
        splits: the division of the examples into splits.
        begins_with_bos: whether each example's prompt begins with the tokenizer's BOS token, ``(n,)`` bool.
    """

    examples: tuple[Example, ...]
    labels: Labels
    splits: Split
    begins_with_bos: NDArray[np.bool_]

    @cached_property
    def inside(self) -> Indices:
        """The indices of the examples of the distribution that the probe is fitted on, in order."""
        return np.sort(np.concatenate([self.splits[name] for name in (TRAIN, CALIBRATION, TEST)]))

    def negatives(self, indices: Indices) -> Indices:
        """Returns those of the given indices whose examples are negative."""
        return indices[~self.labels.positive[indices]]

    def auroc(self, scores: NDArray[np.float64], indices: Indices, seed: int) -> Estimate:
        """Computes the AUROC on the examples with the given indices, from the scores ``(n,)`` of all examples."""
        some = self.labels.of(indices)
        return grouped_auroc(scores[indices], some.positive, some.groups, weights=some.weights, seed=seed)

    @cached_property
    def digest(self) -> str:
        """The ``sha256:…`` of all examples, with their labels, splits, slices (parts of the data), weights and groups."""
        digest = hashlib.sha256()
        for example in self.examples:
            line = [
                example.prompt_ids.tolist(),
                example.completion_ids.tolist(),
                example.selected.tolist(),
                bool(example.positive),
                example.split,
                example.slice,
                example.weight,
                example.group,
            ]
            digest.update(json.dumps(line).encode() + b"\n")
        return f"sha256:{digest.hexdigest()}"

    def facts(self) -> dict[str, object]:
        """Returns facts about the data for a report, such as the number of examples and of groups in each split."""
        return {
            **facts(self.examples),
            "groups": len(np.unique(self.splits.groups[self.inside])),
            "groups_named": self.splits.named,
            "splits_given": self.splits.given,
            "splits": {
                name: {
                    "positives": int(self.labels.positive[indices].sum()),
                    "negatives": int((~self.labels.positive[indices]).sum()),
                    "groups": self.splits.count_groups(name),
                }
                for name, indices in self.splits.parts.items()
                if len(indices)
            },
        }


def prepared(rollouts: Sequence[LabelledRollout], out_of_distribution: Sequence[LabelledRollout], engine: Engine, seed: int) -> FittingData:
    """Tokenises labelled rollouts and divides them into splits.

    Raises:
        ValueError: there are no labels, or the errors of ``tokenised`` and ``split``.
    """
    outside = [replace(rollout, split=OOD, slice=rollout.slice or "out of distribution") for rollout in out_of_distribution]
    examples = tokenised([*rollouts, *outside], engine)
    if not examples:
        raise ValueError("there are no labelled examples in the data")
    splits = split(examples, seed)
    labels = Labels(np.array([example.positive for example in examples]), splits.groups, np.array([example.weight for example in examples]))
    bos = engine.info.bos_token_id
    begins = np.array([bos is not None and bool(len(each.prompt_ids)) and int(each.prompt_ids[0]) == bos for each in examples])
    return FittingData(tuple(examples), labels, splits, begins)
