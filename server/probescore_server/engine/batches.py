"""Divides rollouts into batches that run together, bounded in tokens and in the tokens whose activations are held in memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from probescore.types import Scope
from probescore_server.rollouts import CheckedRollout, Continuation


def batches(rollouts: Sequence[CheckedRollout], max_tokens: int, max_read_tokens: int | None = None) -> Iterator[list[CheckedRollout]]:
    """Yields consecutive rollouts in batches within two limits; a rollout that exceeds a limit is a batch of its own.

    Tokens that rollouts of a batch share, such as those of one prompt, are counted once.

    Args:
        rollouts: rollouts, in the order in which they are batched.
        max_tokens: limit on the tokens of a batch.
        max_read_tokens: limit on the tokens in scope of a batch, whose activations are held; ``None`` = no limit.
    """
    batch: list[CheckedRollout] = []
    counted: set[Hashable] = set()
    tokens = read = 0
    for rollout in rollouts:
        costs = _costs(rollout)
        more = [cost for name, cost in costs.items() if name not in counted]
        more_tokens, more_read = (sum(numbers) for numbers in zip(*more, strict=True)) if more else (0, 0)
        if batch and (tokens + more_tokens > max_tokens or (max_read_tokens is not None and read + more_read > max_read_tokens)):
            yield batch
            batch, counted, tokens, read = [], set(), 0, 0
            more_tokens, more_read = (sum(numbers) for numbers in zip(*costs.values(), strict=True))
        batch.append(rollout)
        counted |= costs.keys()
        tokens, read = tokens + more_tokens, read + more_read
    if batch:
        yield batch


def read_tokens(rollout: CheckedRollout) -> int:
    """Returns how many tokens of a rollout, and of the follow-ups appended to it, are in scope, that is, in the part of the rollout that is
    read.
    """
    return sum(read for _, read in _costs(rollout).values())


def _costs(rollout: CheckedRollout) -> dict[Hashable, tuple[int, int]]:
    """Returns the number of tokens, and of those tokens whose activations are read, of a rollout's prompt and of its completion with
    follow-ups (token ids appended to a completion).

    Each pair of numbers is keyed by a name that is equal for equal tokens, so that shared tokens are counted once.
    """
    prompt, completion, scope = rollout.prompt_ids.tobytes(), rollout.completion, rollout.options.scope
    own: Hashable = completion if completion.follow_ups else completion.token_ids.tobytes()
    prompt_tokens = len(rollout.prompt_ids)
    return {
        prompt: (prompt_tokens, 0 if scope is Scope.COMPLETION else prompt_tokens),
        (prompt, own): (completion.tree_tokens, _read(completion, scope)),
    }


def _read(completion: Continuation, scope: Scope) -> int:
    return completion.tree_tokens - (len(completion.token_ids) if scope is Scope.PROMPT else 0)
