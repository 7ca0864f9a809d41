"""Checks rollouts against what a server says of itself, before anything is sent."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from probescore.errors import FieldViolation, InvalidRequestError
from probescore.types import Chat, Completion, RolloutGroup, ServerInfo, Text
from probescore.wire.requests import ids_array
from probescore.wire.tensors import MessageError

Violations = Generator[FieldViolation, None, int]
"""Yields what is wrong with some ids, and returns how many tokens they are known to be."""


def check_groups(groups: Sequence[RolloutGroup], server: ServerInfo) -> None:
    """Checks token ids against a server's vocabulary, and rollouts against the longest that it takes.

    A server refuses a whole call for one such rollout, and names the first only; this names all of them, without a call. What only the
    server knows is left to it: how many tokens a text has, and which follow-ups its probes append by themselves.

    Args:
        groups: the rollout groups that are to be sent.
        server: what runs at the address, as ``get_server_info()`` returns it.

    Raises:
        InvalidRequestError: ids are not integers or not in the vocabulary, or a prompt, its completion and the longest chain of follow-ups
            have more tokens than the limit. ``violations`` has an entry for each, with its field as in ``groups[2].completions[0].ids``.
    """
    violations = [violation for index, group in enumerate(groups) for violation in _group_violations(group, f"groups[{index}]", server)]
    if violations:
        others = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        message = f"{violations[0].field}: {violations[0].problem}{others}"
        raise InvalidRequestError(message, "INVALID_ARGUMENT", "INVALID_REQUEST", tuple(violations))


def _group_violations(group: RolloutGroup, path: str, server: ServerInfo) -> Iterator[FieldViolation]:
    prompt_tokens = 0
    if not isinstance(group.prompt, (str, Text, Chat)):
        prompt_tokens = yield from _ids_violations(group.prompt, f"{path}.prompt.ids", server)
    limits = (
        (server.limits.max_rollout_tokens, "the server's max_rollout_tokens"),
        (server.model.max_position_embeddings, "the model's max_position_embeddings"),
    )
    # 0 is a limit that the server does not say
    longest = min((limit for limit in limits if limit[0]), default=None)
    for index, entry in enumerate(group.completions):
        completion = entry if isinstance(entry, Completion) else Completion(entry)
        place = f"{path}.completions[{index}]"
        tokens = prompt_tokens + (yield from _completion_violations(completion, place, server))
        if longest is not None and tokens > longest[0]:
            limit, name = longest
            yield FieldViolation(place, f"{tokens} tokens; the limit is {limit}, {name}: send a shorter one, since nothing is cut")


def _completion_violations(completion: Completion, path: str, server: ServerInfo) -> Violations:
    tokens = 0
    if not isinstance(completion.tokens, str):
        tokens = yield from _ids_violations(completion.tokens, f"{path}.ids", server)
    longest_chain = 0
    for index, follow_up in enumerate(completion.follow_ups):
        longest_chain = max(longest_chain, (yield from _completion_violations(follow_up, f"{path}.follow_ups[{index}]", server)))
    return tokens + longest_chain


def _ids_violations(given: ArrayLike, path: str, server: ServerInfo) -> Violations:
    try:
        ids = ids_array(given, path)
    except MessageError as error:
        yield FieldViolation(error.field, error.problem)
        return 0
    vocabulary = server.model.vocab_size
    if ids.size and not (ids.min() >= 0 and ids.max() < vocabulary):
        index = int(np.flatnonzero((ids < 0) | (ids >= vocabulary))[0])
        yield FieldViolation(path, f"id {ids[index]} at index {index} is not in the vocabulary, [0, {vocabulary})")
    return len(ids)
