"""Defines the value objects for a model's activations that a server or engine returns: the ways of pooling them, and the activations of one
completion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from probescore.types.readings import Reading
from probescore.types.scores import CompletionStatus, Usage


class Pool(str, Enum):
    """Enumeration of the forms in which a server returns a completion's activations: unpooled, or pooled over the tokens that count under
    its mask.

    ``tokens`` gives one row for each token; each of the other members (``mean``, ``last``, ``max``) pools all tokens to one row, feature by
    feature.
    """

    TOKENS = "tokens"
    MEAN = "mean"
    LAST = "last"
    MAX = "max"


@dataclass(frozen=True)
class ActivationsInfo:
    """Description of what produced the activations that a server sent, and of the work done.

    Attributes:
        model_fingerprint: fingerprint of the frozen model, ``"sha256:…"``.
        tokenizer_fingerprint: fingerprint of the server's tokenizer; empty if the server has none.
        taps: names of the taps (places in the model) at which activations were read.
        pools: ways of pooling tokens, of which the server sent the results.
        dtype: format in which the numbers travelled: ``float32``, ``bfloat16`` or ``float16``. Arrays hold the same numbers exactly as
            float32.
        usage: the work done for the completions that began in the same message of the response.
        reading: the reading (whose activations these are) that the request named; ``None`` = it named none, and these are the frozen
            model's.
    """

    model_fingerprint: str
    tokenizer_fingerprint: str
    taps: tuple[str, ...]
    pools: tuple[Pool, ...]
    dtype: str
    usage: Usage
    reading: Reading | None = None


@dataclass(frozen=True, eq=False)
class CompletionActivations:
    """The activations of one completion, or of a follow-up (token ids appended to a finished completion, which the model reads as a fork of
    the completion).

    Attributes:
        group_index, completion_index: position of the completion in the request.
        id: id that the request gave the completion.
        status: ``NON_FINITE`` if the model gives NaN or an infinity at a tap (place in the model), ``OVERFLOW`` if a number is too large
            for the format that a server was asked for; ``tokens`` and ``pooled`` are then empty.
        token_ids: tokens in scope, ``(T,)`` int32: entry *i* of ``tokens`` is read at the position whose input is ``token_ids[i]``.
        selections: which tokens count, ``(1 + spans, T)`` bool: in the whole scope under the mask, then in each span.
        spans: names of the spans (parts of the completion), in the order of the rows of ``selections``.
        tokens: activations ``(T, hidden_size)`` float32 of all tokens in scope, whether they count or not, a dictionary keyed by tap name;
            empty unless asked for.
        pooled: pooled activations ``(1 + spans, pools, hidden_size)`` float32, a dictionary keyed by tap name, with poolings in the order
            of the request; NaN if no token counts.
        status_message: why there are no activations, for people.
        inexact_ids: whether some token ids were obtained by tokenising text.
        follow_ups: activations of the completion's follow-ups, in the order of the request.
        prompt_tokens: how many of ``token_ids`` are the prompt's; they come first.
        info: what produced the activations, as the server reports; ``None`` if the activations come from an ``Engine`` in the same process.
        reading: the reading (whose activations these are) that was asked for by name, as its name was resolved; ``None`` = none was named,
            and the activations are the frozen model's.
    """

    group_index: int
    completion_index: int
    id: str
    status: CompletionStatus
    token_ids: NDArray[np.int32]
    selections: NDArray[np.bool_]
    spans: tuple[str, ...]
    tokens: Mapping[str, NDArray[np.float32]]
    pooled: Mapping[str, NDArray[np.float32]]
    status_message: str = ""
    inexact_ids: bool = False
    follow_ups: tuple[CompletionActivations, ...] = ()
    prompt_tokens: int = 0
    info: ActivationsInfo | None = None
    reading: Reading | None = None
