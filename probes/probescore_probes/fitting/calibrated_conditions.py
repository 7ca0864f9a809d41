"""Describes, for a probe's manifest, the negative rollouts on which a threshold was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from probescore_probes.fitting.labelled_rollouts import Example
from probescore_server.probes.format.manifest import CalibrationConditions
from probescore_server.validation.calibrated_rollouts import prompt_shape


def conditions_of(
    negatives: Sequence[Example],
    groups: NDArray[np.int64],
    *,
    dtype: str,
    bos_token_id: int | None,
    generation_prompt_ids: Sequence[int],
    dataset_sha256: str | None = None,
) -> CalibrationConditions:
    """Returns what the ``n`` negatives were like on which a threshold was found; a server flags rollouts that are unlike them.

    Args:
        negatives: the negatives as token ids, at least one.
        groups: number of each negative's group, ``(n,)``.
        dtype: dtype of the model that scored them.
        bos_token_id: id of the token that begins a sequence (BOS); ``None`` = there is none.
        generation_prompt_ids: the ids with which the model's chat template ends a prompt; empty = there is no template.
        dataset_sha256: ``sha256:…`` of the file that held them.
    """
    prompts = [len(example.prompt_ids) for example in negatives]
    completions = [int(np.count_nonzero(example.selected)) for example in negatives]
    shapes = {
        prompt_shape(example.prompt_ids, example.completion_ids, bos_token_id=bos_token_id, generation_prompt_ids=generation_prompt_ids)
        for example in negatives
    }
    return CalibrationConditions(
        groups=len(np.unique(groups)),
        dtype=cast('Literal["float32", "bfloat16", "float16"]', dtype),
        shortest_prompt=min(prompts),
        longest_prompt=max(prompts),
        shortest_completion=min(completions),
        longest_completion=max(completions),
        prompt_forms=tuple(sorted({example.form for example in negatives})),
        prompt_shapes=tuple(sorted(shapes)),
        generation_prompt_ids=tuple(generation_prompt_ids),
        dataset_sha256=dataset_sha256,
    )
