"""From what a client asks to checked rollouts of ids.

Every check of a request's content is here, and each names the field at fault as in the proto. Used by the front process and by
``Engine.score`` alike, so it imports neither torch nor grpc.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probescore.reductions import Reduction
from probescore.types import Chat, Completion, OutputPer, ProbeInfo, RolloutGroup, Scope, Span, Text, TokenIds
from probescore.wire.contract import MAX_FOLLOW_UP_DEPTH
from probescore_server.errors import InvalidRequest, LimitExceeded
from probescore_server.request_cost import RequestCost
from probescore_server.rollouts import CheckedRollout, Continuation, EngineInfo, ResolvedOptions

MAX_SPAN_NAME_BYTES = 64

TokenScoresWanted = Literal["all"] | Sequence[str]

# ---------------------------------------------------------------------------------------------------------------------- options


def resolve_options(
    info: EngineInfo,
    *,
    probes: Sequence[str] = (),
    reductions: Sequence[Reduction | str] = (),
    token_scores: TokenScoresWanted = (),
    scope: Scope | str = Scope.COMPLETION,
    return_token_ids: bool = False,
    return_token_texts: bool = False,
) -> ResolvedOptions:
    """Checks how a request wants its rollouts scored.

    Args:
        info: what is loaded.
        probes: ``name`` or ``name@version`` each; empty = every loaded probe.
        reductions: empty = each probe's default.
        token_scores: the probes whose per-token scores are wanted, or ``"all"``: every one of the request that scores tokens.
        scope: which tokens are scored.
        return_token_ids: whether ids are sent back.
        return_token_texts: whether the tokens are sent back as text.

    Raises:
        InvalidRequest: naming ``probes[i]``, ``reductions[i]``, ``token_scores.probes[i]`` or ``scope``.
    """
    by_key = {probe.key: probe for probe in info.probes}
    keys = _resolve_names(info.probes, probes, "probes") if probes else tuple(by_key)
    if not keys:
        raise InvalidRequest("probes", "no probe is loaded: the server was started without any")
    match token_scores:
        case "all":
            wanted = tuple(key for key in keys if by_key[key].output_per is OutputPer.TOKEN)
        case str():
            raise InvalidRequest("token_scores", f"{token_scores!r} is neither 'all' nor a list of probes")
        case _:
            wanted = _resolve_names(info.probes, token_scores, "token_scores.probes")
            _check_token_scores(wanted, keys, by_key)
    return ResolvedOptions(
        probes=keys,
        reductions=tuple(_parse_reduction(written, index) for index, written in enumerate(reductions)),
        token_scores=frozenset(wanted),
        scope=parse_scope(scope),
        return_token_ids=return_token_ids,
        return_token_texts=return_token_texts,
    )


def _check_token_scores(wanted: Sequence[str], requested: Sequence[str], by_key: Mapping[str, ProbeInfo]) -> None:
    known = set(requested)
    for index, key in enumerate(wanted):
        if key not in known:
            raise InvalidRequest(f"token_scores.probes[{index}]", f"{key} is not among the probes of this request")
        if by_key[key].output_per is not OutputPer.TOKEN:
            raise InvalidRequest(f"token_scores.probes[{index}]", f"{key} pools by itself and has no scores per token")


def _resolve_names(loaded: Sequence[ProbeInfo], names: Sequence[str], path: str) -> tuple[str, ...]:
    known_as: dict[str, list[str]] = defaultdict(list)
    for probe in loaded:
        for name in (probe.name, probe.key):
            known_as[name].append(probe.key)
    keys: dict[str, None] = {}
    for index, name in enumerate(names):
        matches = known_as.get(name)
        if not matches:
            known = ", ".join(probe.key for probe in loaded) or "none"
            raise InvalidRequest(f"{path}[{index}]", f"unknown probe {name[:100]!r}; loaded: {known}", "UNKNOWN_PROBE")
        if len(matches) > 1:
            raise InvalidRequest(f"{path}[{index}]", f"{name!r} is loaded in several versions; name one of {', '.join(matches)}")
        if matches[0] in keys:
            raise InvalidRequest(f"{path}[{index}]", f"{matches[0]} appears twice")
        keys[matches[0]] = None
    return tuple(keys)


def _parse_reduction(written: Reduction | str, index: int) -> Reduction:
    try:
        return Reduction.parse(written)
    except ValueError as error:
        raise InvalidRequest(f"reductions[{index}]", str(error)) from None


def parse_scope(scope: Scope | str) -> Scope:
    """A scope by its name.

    Raises:
        InvalidRequest: naming ``scope``.
    """
    try:
        return Scope(scope)
    except ValueError:
        raise InvalidRequest("scope", f"{scope!r} is none of {', '.join(known.value for known in Scope)}") from None


# ------------------------------------------------------------------------------------------------------------------------ texts


@dataclass(frozen=True, slots=True)
class PendingText:
    """Something to tokenise before its request can be checked.

    Attributes:
        field: where it stands in the request: ``groups[0].prompt``, ``groups[2].completions[0].follow_ups[1]``.
        content: a ``str`` is a completion's text; a prompt is a ``Text`` or a ``Chat``.
    """

    field: str
    content: str | Text | Chat

    @property
    def bytes(self) -> int:
        """Its UTF-8 bytes; of a chat, those of all roles and contents."""
        match self.content:
            case str():
                return utf8_bytes(self.content)
            case Text():
                return utf8_bytes(self.content.text)
            case Chat():
                return sum(utf8_bytes(message.role) + utf8_bytes(message.content) for message in self.content.messages)


def utf8_bytes(text: str) -> int:
    """How many bytes it takes. What is no text, or half a surrogate pair, is for the tokenizer to refuse."""
    if not isinstance(text, str):
        return 0
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def pending_texts(groups: Sequence[RolloutGroup]) -> list[PendingText]:
    """Everything in a request that came as text or chat, in the request's order; empty for a request of ids."""
    texts: list[PendingText] = []
    for i, group in enumerate(groups):
        match group.prompt:
            case str():
                texts.append(PendingText(f"groups[{i}].prompt", Text(group.prompt)))
            case Text() | Chat():
                texts.append(PendingText(f"groups[{i}].prompt", group.prompt))
        for j, completion in enumerate(group.completions):
            texts.extend(_continuation_texts(_as_completion(completion), f"groups[{i}].completions[{j}]"))
    return texts


@dataclass(frozen=True)
class ChatLimits:
    """What rendering a chat may take: how long its text may become, in UTF-8 bytes, and how many seconds."""

    max_bytes: int
    max_seconds: float


def check_texts(
    texts: Sequence[PendingText], *, max_rollout_tokens: int, max_request_tokens: int, max_text_bytes_per_token: int, max_chat_messages: int
) -> None:
    """Refuses texts that are too long to be tokenised for what they could become.

    Raises:
        LimitExceeded: naming the text, ``groups`` for all together, or ``groups[i].prompt.chat.messages``.
    """
    total = 0
    for text in texts:
        if isinstance(text.content, Chat) and (count := len(text.content.messages)) > max_chat_messages:
            field = f"{text.field}.chat.messages"
            raise LimitExceeded(field, count, "messages", "max_chat_messages", max_chat_messages, "send the prompt as token ids or text")
        total += (size := text.bytes)
        check_text_bytes(size, text.field, max_text_bytes_per_token * max_rollout_tokens)
    if total > (most := max_text_bytes_per_token * max_request_tokens):
        limit = "max_text_bytes_per_token × max_request_tokens"
        raise LimitExceeded("groups", total, "bytes of text", limit, most, "send it in several requests, or as token ids", "TOO_LONG")


def check_text_bytes(size: int, field: str, most: int) -> None:
    """Refuses a text, as it came or as a template rendered it, that is too long to be tokenised.

    Raises:
        LimitExceeded: naming ``field``.
    """
    if size > most:
        limit = "max_text_bytes_per_token × max_rollout_tokens"
        raise LimitExceeded(field, size, "bytes of text", limit, most, "send a shorter text, or token ids", "TOO_LONG")


def _continuation_texts(completion: Completion, path: str) -> Iterator[PendingText]:
    if isinstance(completion.tokens, str):
        yield PendingText(path, completion.tokens)
    for index, follow_up in enumerate(completion.follow_ups):
        yield from _continuation_texts(follow_up, f"{path}.follow_ups[{index}]")


def _as_completion(completion: Completion | TokenIds | str) -> Completion:
    return completion if isinstance(completion, Completion) else Completion(completion)


# --------------------------------------------------------------------------------------------------------------------- rollouts


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
    """Checks a request's rollouts against what is loaded and the limits.

    Args:
        groups: as asked.
        info: what is loaded.
        options: from ``resolve_options``.
        encoded: the ids ``(T,)`` of each of ``pending_texts(groups)``, by its ``field``.
        max_rollout_tokens: of prompt + completion + longest chain of follow-ups, the probes' own included; ``None`` = no limit. The
            positions that the model was made for are a limit in any case.
        max_request_tokens: of all groups together, a prompt counted once per group, and what spans read beyond one reading of each token.
        max_span_scores: scores that the spans of one completion and its follow-ups read.
        max_request_values: numbers in the answer.

    Returns:
        Per group, per completion.

    Raises:
        InvalidRequest: naming the field as in the proto: ``groups[2].completions[0].mask``.
    """
    if not groups:
        raise InvalidRequest("groups", "at least one group is needed")
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
        total = sum(
            len(group[0].prompt_ids) + sum(rollout.completion.tree_tokens + rollout.reread_tokens for rollout in group)
            for group in rollouts
        )
        if total > max_request_tokens:
            remedy = "send it in several requests, or with fewer or shorter spans"
            raise LimitExceeded("groups", total, "tokens", "max_request_tokens", max_request_tokens, remedy, "TOO_LONG")
    if max_request_values is not None:
        values = sum(cost.values(rollout) for group in rollouts for rollout in group)
        if values > max_request_values:
            remedy = "send it in several requests, or ask for fewer probes, reductions, spans or scores per token"
            raise LimitExceeded("groups", values, "numbers in its answer", "max_request_values", max_request_values, remedy)
    return rollouts


@dataclass(frozen=True, slots=True)
class _RequestChecks:
    """What the checks of one request's rollouts share.

    Attributes:
        longest: the limit on a rollout's tokens, and its name.
        longest_appended: tokens of the longest follow-up that a requested probe appends by itself.
        all_appended: tokens of all those follow-ups.
        cost: of the options.
        max_span_scores: scores that the spans of one completion and its follow-ups may read.
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
            completion = self._resolve_continuation(_as_completion(asked), place, depth=0, inexact=inexact)
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
            # both are relative to the completion, of which nothing is scored
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
