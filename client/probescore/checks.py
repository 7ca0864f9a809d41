"""Checks rollouts against a server's published vocabulary and limits, before anything is sent."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from probescore.errors import FieldViolation, InvalidRequestError
from probescore.types import Chat, Completion, RolloutGroup, ServerInfo, Text
from probescore.wire.requests import ids_array
from probescore.wire.tensors import MessageError

Violations = Generator[FieldViolation, None, int]
"""Generator type of a check of token ids: yields the violations that the check finds, and returns the number of tokens as far as the client
can know it."""


def check_groups(groups: Sequence[RolloutGroup], server: ServerInfo) -> None:
    """Checks token ids against a server's vocabulary, and the lengths of rollouts against the server's limit.

    A server refuses a whole RPC for one bad rollout, and names only the first one; this function names all bad rollouts, without an RPC.
    Two facts are known to the server alone and are not checked here: the number of tokens of a text, and the token ids that the server's
    probes themselves append to a completion.

    Args:
        groups: rollout groups that will be sent.
        server: description of the server, as ``get_server_info()`` returns it.

    Raises:
        InvalidRequestError: token ids are not integers or not in the vocabulary, or a prompt, its completion and the longest chain of
            follow-ups (token ids appended to the completion) have together more tokens than the limit. ``violations`` has an entry for each
            fault, with the path of the field, such as ``groups[2].completions[0].ids``.
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
