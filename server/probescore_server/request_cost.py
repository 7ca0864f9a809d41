"""Computes what a request costs beside its tokens: the numbers in its answer, and the scores that are read again for its spans.

The cost is counted from the request alone, before anything is computed, so that a request that is too costly can be refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from probescore.types import OutputPer, Scope
from probescore_server.rollouts import CheckedRollout, Continuation, EngineInfo, ResolvedOptions

MAX_KNOWN = 16
"""The cost factors of so many distinct options are cached: most calls repeat the options of others, possibly of a thousand probes."""


@dataclass(frozen=True)
class RequestCost:
    """Holds the factors that turn the tokens and spans of a request's rollouts into their cost, as the request's options determine them.

    Attributes:
        scope: which tokens are scored: the prompt's, the completion's or both.
        row_values: numbers in the answer for a whole completion, and again for each of its spans: labels × reductions, over all probes.
        token_values: numbers in the answer for each token that is scored.
        appended_values: numbers in the answer for the tokens of the follow-ups that probes append to a completion by themselves.
        span_scores: scores that are read for each token of a span.
        context_scores: scores that are read, once for each span, for each token before the completion.
    """

    scope: Scope
    row_values: int
    token_values: int
    appended_values: int
    span_scores: int
    context_scores: int

    @classmethod
    def of(cls, info: EngineInfo, options: ResolvedOptions) -> RequestCost:
        """Returns the cost factors for a request with these options on an engine that has loaded what ``info`` says."""
        return _cost(info, options)

    def values(self, rollout: CheckedRollout) -> int:
        """Counts the numbers, scores of 4 bytes each, that the answer holds for one rollout and its follow-ups."""
        prompt = 0 if self.scope is Scope.COMPLETION else len(rollout.prompt_ids)
        completion = 0 if self.scope is Scope.PROMPT else len(rollout.completion.token_ids)
        values = 0
        for continuation, _ in _tree(rollout.completion, 0):
            own = prompt + completion if continuation is rollout.completion else len(continuation.token_ids)
            values += (1 + len(continuation.spans)) * self.row_values + own * self.token_values + self.appended_values
        return values

    def scores_of_spans(self, rollout: CheckedRollout) -> int:
        """Counts the scores that are read to reduce the spans of one rollout and of its follow-ups."""
        return sum(
            sum(span.end - span.start for span in continuation.spans) * self.span_scores
            + len(continuation.spans) * context * self.context_scores
            for continuation, context in _tree(rollout.completion, len(rollout.prompt_ids))
        )

    def reread_tokens(self, completion: Continuation, prompt_tokens: int) -> int:
        """Counts the tokens that the spans of a completion and its follow-ups read beyond reading each token once.

        Spans that together cover each token once add nothing. A span without tokens costs time too, and counts as one token.

        Args:
            completion: the completion with its follow-ups and spans.
            prompt_tokens: number of tokens of the prompt before the completion.
        """
        read = 0
        for continuation, context in _tree(completion, prompt_tokens):
            read += sum(max(1, span.end - span.start) for span in continuation.spans)
            read += len(continuation.spans) * context if self.context_scores else 0
        return max(0, read - completion.tree_tokens)


def _tree(continuation: Continuation, context: int) -> Iterator[tuple[Continuation, int]]:
    """Yields a completion and each of its nested follow-ups, each with the number of tokens before it."""
    yield continuation, context
    for follow_up in continuation.follow_ups:
        yield from _tree(follow_up, context + len(continuation.token_ids))


@lru_cache(MAX_KNOWN)
def _cost(info: EngineInfo, options: ResolvedOptions) -> RequestCost:
    row = token = appended = span = context = 0
    loaded = {probe.key: probe for probe in info.probes}
    for key in options.probes:
        labels = len(loaded[key].labels)
        pools = loaded[key].output_per is OutputPer.ROLLOUT
        reductions = 1 if pools else len(options.reductions) or 1
        follow_up = info.max_follow_up_tokens.get(key, 0)
        row += labels * reductions
        if key in options.token_scores:
            token += 0 if follow_up else labels
            appended += labels * follow_up
        if not follow_up:  # A probe with a follow-up of its own scores none of the tokens that spans cover.
            span += labels * reductions if not pools else info.model.hidden_size
            context += info.model.hidden_size if key in info.pools_with_prompt else 0
    return RequestCost(options.scope, row, token, appended, span, context)
