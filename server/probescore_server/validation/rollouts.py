"""Checks the rollouts of a request, with their token ids, masks, spans (token ranges) and follow-ups (texts that continue a completion),
against the loaded model and the limits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probescore.types import Chat, Completion, RolloutGroup, Scope, Span, Text, TokenIds
from probescore.wire.contract import MAX_FOLLOW_UP_DEPTH
from probescore_server.errors import InvalidRequest, LimitExceeded
from probescore_server.request_cost import RequestCost
from probescore_server.rollouts import CheckedRollout, Continuation, EngineInfo, ResolvedOptions
from probescore_server.validation.texts import as_completion

MAX_SPAN_NAME_BYTES = 64


def resolve_rollouts(
    groups: Sequence[RolloutGroup],
    info: EngineInfo,
    options: ResolvedOptions,
    *,
    encoded: Mapping[str, NDArray[np.int32]] | None = None,
    max_rollout_tokens: int | None = None,
    max_request_tokens: int | None = None,
    max_span_scores: int | None = None,
    max_request_values: int | None = None,
) -> list[list[CheckedRollout]]:
    """Checks a request's rollouts against the loaded model and the limits, and returns them as token ids that are ready to be scored.

    A limit that is ``None`` is not applied.

    Args:
        groups: the rollout groups as the client sent them, each a prompt with its completions.
        info: the model and probes that are loaded.
        options: the request's options, as ``resolve_options`` returns them.
        encoded: a dictionary, keyed by the ``field`` of each text of ``pending_texts(groups)``, of the text's token ids, ``(T,)`` int32.
        max_rollout_tokens: the largest number of tokens of prompt + completion + longest chain of follow-ups (texts that continue a
            completion), including the follow-ups that probes append. The number of positions for which the model was made is a limit in any
            case.
        max_request_tokens: the largest number of tokens of all groups, with a prompt counted once per group and the extra token reads that
            spans cause included, and all of it as often as the model reads it: for each reading, and for each adapter that probes bring.
        max_span_scores: the largest number of token scores that the spans (token ranges) of one completion and its follow-ups may read.
        max_request_values: the largest number of numbers in the response.

    Returns:
        The checked rollouts, by group and then by completion, in the request's order.

    Raises:
        InvalidRequest: a field is invalid; the error names the field's path in the request message, such as
            ``groups[2].completions[0].mask``.
        LimitExceeded: a limit is exceeded; the error names the field's path likewise.
    """
    if not groups:
        raise InvalidRequest("groups", "at least one group is needed")
    if options.activations is not None and len(options.readings) > 1:
        raise InvalidRequest("readings", f"{len(options.readings)} readings; activations are read of one at a time")
    limits = {
        "max_rollout_tokens": max_rollout_tokens,
        "max_position_embeddings of the model": info.model.max_position_embeddings,
        "original_max_position_embeddings (beyond it the model's rotary embedding changes)": info.max_unchanged_positions,
    }
    longest = min(((limit, name) for name, limit in limits.items() if limit), default=None)
    appended = [info.max_follow_up_tokens.get(key, 0) for key in options.probes]
    cost = RequestCost.of(info, options)
    request = _RequestChecks(info, options, encoded or {}, longest, max(appended, default=0), sum(appended), cost, max_span_scores)
    rollouts = [request.resolve_group(group, f"groups[{index}]") for index, group in enumerate(groups)]
    if max_request_tokens is not None:
        total = options.passes * sum(
            len(group[0].prompt_ids) + sum(rollout.completion.tree_tokens + rollout.reread_tokens for rollout in group)
            for group in rollouts
        )
        if total > max_request_tokens:
            remedy = "send it in several requests, with fewer or shorter spans, or with fewer readings or probes that bring an adapter"
            raise LimitExceeded("groups", total, "tokens", "max_request_tokens", max_request_tokens, remedy, "TOO_LONG")
    if max_request_values is not None:
        values = sum(cost.values(rollout) for group in rollouts for rollout in group)
        if values > max_request_values:
            remedy = "send it in several requests, or ask for fewer probes, readings, reductions, spans or scores per token"
            raise LimitExceeded("groups", values, "numbers in its answer", "max_request_values", max_request_values, remedy)
    return rollouts


@dataclass(frozen=True, slots=True)
class _RequestChecks:
    """Checker of the rollouts of one request, with the data that all checks need.

    Attributes:
        info: the model and probes that are loaded.
        options: the request's options.
        encoded: a dictionary, keyed by the field of each text, of the text's token ids, ``(T,)`` int32.
        longest: the limit on a rollout's tokens and the limit's name; ``None`` = no limit.
        longest_appended: the largest number of token ids that one requested probe itself appends to a completion.
        all_appended: the number of token ids that all requested probes together append to a completion.
        cost: the factors, given by the request's options, from tokens and spans (token ranges) to costs.
        max_span_scores: the largest number of token scores that the spans (token ranges) of one completion and its follow-ups may read;
            ``None`` = no limit.
    """

    info: EngineInfo
    options: ResolvedOptions
    encoded: Mapping[str, NDArray[np.int32]]
    longest: tuple[int, str] | None
    longest_appended: int
    all_appended: int
    cost: RequestCost
    max_span_scores: int | None

    def resolve_group(self, group: RolloutGroup, path: str) -> list[CheckedRollout]:
        inexact = isinstance(group.prompt, (str, Text, Chat))
        if isinstance(group.prompt, (str, Text, Chat)):
            prompt_ids = self._check_range(self.encoded[f"{path}.prompt"], f"{path}.prompt")
        else:
            prompt_ids = self._read_ids(group.prompt, f"{path}.prompt.ids")
        if len(group.completions) == 0:
            raise InvalidRequest(f"{path}.completions", "at least one completion is needed")
        rollouts = []
        for index, asked in enumerate(group.completions):
            place = f"{path}.completions[{index}]"
            completion = self._resolve_continuation(as_completion(asked), place, depth=0, inexact=inexact)
            self._check_length(len(prompt_ids) + completion.chain_tokens + self.longest_appended, place)
            self._check_bos(prompt_ids, completion, f"{path}.prompt")
            reread = self.cost.reread_tokens(completion, len(prompt_ids))
            rollouts.append(CheckedRollout(prompt_ids, completion, self.options, self.all_appended, reread))
            self._check_spans(rollouts[-1], place)
        return rollouts

    def _resolve_continuation(self, asked: Completion, path: str, *, depth: int, inexact: bool) -> Continuation:
        if isinstance(asked.tokens, str):
            inexact = True
            token_ids = self._check_range(self.encoded[path], path)
        else:
            token_ids = self._read_ids(asked.tokens, f"{path}.ids")
        if depth == 0 and self.options.scope is Scope.PROMPT:
            # A mask and spans are relative to the completion, of which nothing is scored.
            if asked.mask is not None:
                raise InvalidRequest(f"{path}.mask", "a mask has no meaning where the scope is 'prompt'")
            if asked.spans:
                raise InvalidRequest(f"{path}.spans", "spans have no meaning where the scope is 'prompt'")
        if asked.follow_ups and depth == MAX_FOLLOW_UP_DEPTH:
            raise InvalidRequest(f"{path}.follow_ups", f"follow-ups nest more than {MAX_FOLLOW_UP_DEPTH} deep")
        return Continuation(
            token_ids=token_ids,
            mask=None if asked.mask is None else _read_mask(asked.mask, len(token_ids), f"{path}.mask"),
            spans=_check_spans(asked.spans, len(token_ids), path),
            follow_ups=tuple(
                self._resolve_continuation(follow_up, f"{path}.follow_ups[{index}]", depth=depth + 1, inexact=inexact)
                for index, follow_up in enumerate(asked.follow_ups)
            ),
            id=asked.id,
            inexact_ids=inexact,
        )

    def _read_ids(self, tokens: TokenIds, path: str) -> NDArray[np.int32]:
        try:
            ids = np.asarray(tokens)
        except (ValueError, OverflowError):
            raise InvalidRequest(path, "token ids must be a flat list of integers") from None
        if ids.ndim != 1:
            raise InvalidRequest(path, f"token ids must have one axis, got shape {ids.shape}")
        if ids.size == 0:
            return np.zeros(0, np.int32)
        if ids.dtype.kind not in "iu":
            raise InvalidRequest(path, f"token ids must be integers below the vocabulary size, got {ids.dtype}")
        return self._check_range(ids, path)

    def _check_range(self, ids: NDArray[np.integer[Any]], path: str) -> NDArray[np.int32]:
        if ids.size and not 0 <= ids.min() <= ids.max() < self.info.model.vocab_size:
            index = int(np.flatnonzero((ids < 0) | (ids >= self.info.model.vocab_size))[0])
            raise InvalidRequest(path, f"id {ids[index]} at index {index} is not in the vocabulary, [0, {self.info.model.vocab_size})")
        if self.info.placeholders:
            self._check_is_text(ids, path)
        return np.ascontiguousarray(ids, np.int32)

    def _check_is_text(self, ids: NDArray[np.integer[Any]], path: str) -> None:
        found = np.flatnonzero(np.isin(ids, list(self.info.placeholders)))
        if len(found):
            token = int(ids[found[0]])
            problem = (
                f"id {token} at index {found[0]} is {self.info.placeholders[token]}: it stands for a picture, audio or video, which cannot "
                "be sent yet, and without it the score would not be this rollout's; send rollouts of text alone"
            )
            raise InvalidRequest(path, problem, "NOT_TEXT")

    def _check_length(self, tokens: int, path: str) -> None:
        if self.longest is not None and tokens > self.longest[0]:
            limit, name = self.longest
            remedy = "send a shorter one, since nothing is cut"
            raise LimitExceeded(path, tokens, "tokens with its prompt and follow-ups", name, limit, remedy, "TOO_LONG")

    def _check_spans(self, rollout: CheckedRollout, path: str) -> None:
        limit = self.max_span_scores
        if limit is not None and (read := self.cost.scores_of_spans(rollout)) > limit:
            remedy = "send fewer or shorter spans, or ask for fewer probes or reductions"
            raise LimitExceeded(f"{path}.spans", read, "scores are read for its spans", "max_span_scores", limit, remedy)

    def _check_bos(self, prompt_ids: NDArray[np.int32], completion: Continuation, path: str) -> None:
        bos = self.info.bos_token_id
        if bos is None:
            return
        first = next((int(ids[0]) for ids in (prompt_ids, completion.token_ids) if len(ids)), None)
        for key in self.options.probes:
            expected = self.info.expects_bos.get(key)
            if expected is not None and (first == bos) != expected:
                said = "must" if expected else "must not"
                found = "it is empty" if first is None else f"the first id is {first}"
                raise InvalidRequest(path, f"for probe {key} the rollout {said} start with BOS ({bos}); {found}", "BOS")


def _read_mask(mask: ArrayLike, length: int, path: str) -> NDArray[np.bool_]:
    try:
        values = np.asarray(mask)
    except ValueError:
        raise InvalidRequest(path, "a mask must be a flat list of 0 and 1") from None
    if values.shape != (length,):
        raise InvalidRequest(path, f"shape {values.shape} for {length} tokens; expected ({length},)")
    if length and not np.isin(values, (0, 1)).all():
        raise InvalidRequest(path, "a mask holds only 0 and 1")
    return values.astype(np.bool_)


def _check_spans(spans: Sequence[Span], length: int, path: str) -> tuple[Span, ...]:
    names: set[str] = set()
    for index, span in enumerate(spans):
        place = f"{path}.spans[{index}]"
        if not span.name or len(span.name.encode()) > MAX_SPAN_NAME_BYTES:
            raise InvalidRequest(f"{place}.name", f"{len(span.name.encode())} bytes; a name has 1 to {MAX_SPAN_NAME_BYTES}")
        if span.name in names:
            raise InvalidRequest(f"{place}.name", f"{span.name!r} appears twice in one completion")
        names.add(span.name)
        if not 0 <= span.start <= span.end:
            raise InvalidRequest(f"{place}.start", f"{span.start} is not in [0, end], end is {span.end}")
        if span.end > length:
            raise InvalidRequest(f"{place}.end", f"{span.end} is beyond the completion's {length} tokens")
    return tuple(spans)
