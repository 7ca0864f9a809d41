"""Computes the costs of a scoring request other than its tokens: how many numbers its response has, and how many token scores are read
again for its spans (token ranges).

The costs are computed from the request alone, before any token is scored, so that a request that is too costly can be refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from probescore.types import OutputPer, Scope
from probescore_server.rollouts import CheckedRollout, Continuation, EngineInfo, ResolvedOptions

MAX_KNOWN = 16
"""Limits the number of distinct options whose cost factors are cached. Most requests repeat the options of other requests, which may name a
thousand probes.
"""


@dataclass(frozen=True)
class RequestCost:
    """Value object with the factors, determined by the options of a scoring request, that turn the numbers of tokens and spans (token
    ranges) of its rollouts into costs. Each counts all readings that the request names.

    Attributes:
        scope: which tokens are scored: the prompt's, the completion's or both.
        row_values: numbers in the response for a whole completion, and again for each of its spans: labels × reductions, summed over all
            probes; of activations, hidden size × poolings, summed over all taps (places in the model).
        token_values: numbers in the response for each token that is scored.
        appended_values: numbers in the response for the follow-ups (further token ids) that probes themselves append to a completion.
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
        """Returns the cost factors for a scoring request with the given options, on a server with the model and probes that ``info``
        describes.
        """
        return _cost(info, options)

    def values(self, rollout: CheckedRollout) -> int:
        """Returns the number of scores, or of activations, in the response for one rollout and its follow-ups (texts that continue the
        completion).
        """
        prompt = 0 if self.scope is Scope.COMPLETION else len(rollout.prompt_ids)
        completion = 0 if self.scope is Scope.PROMPT else len(rollout.completion.token_ids)
        values = 0
        for continuation, _ in _tree(rollout.completion, 0):
            own = prompt + completion if continuation is rollout.completion else len(continuation.token_ids)
            values += (1 + len(continuation.spans)) * self.row_values + own * self.token_values + self.appended_values
        return values

    def scores_of_spans(self, rollout: CheckedRollout) -> int:
        """Returns the number of token scores that are read to reduce the spans (token ranges) of one rollout and of its follow-ups (texts
        that continue the completion).
        """
        return sum(
            sum(span.end - span.start for span in continuation.spans) * self.span_scores
            + len(continuation.spans) * context * self.context_scores
            for continuation, context in _tree(rollout.completion, len(rollout.prompt_ids))
        )

    def reread_tokens(self, completion: Continuation, prompt_tokens: int) -> int:
        """Returns the number of extra token reads that the spans (token ranges) of a completion and of its follow-ups (texts that continue
        it) cause, beyond one read of each token.

        Spans that together cover each token once cause none. A span without tokens takes time too, and counts as one token.

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
    """Yields pairs for a completion and for each follow-up (text that continues it, at any depth): the completion or follow-up, and the
    number of tokens before it in its sequence.
    """
    yield continuation, context
    for follow_up in continuation.follow_ups:
        yield from _tree(follow_up, context + len(continuation.token_ids))


@lru_cache(MAX_KNOWN)
def _cost(info: EngineInfo, options: ResolvedOptions) -> RequestCost:
    row = token = appended = span = context = 0
    if (reads := options.activations) is not None:
        numbers = info.model.hidden_size * len(reads.taps)
        row, token = numbers * len(reads.pools), numbers * reads.tokens
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
    factors = (row, token, appended, span, context)
    return RequestCost(options.scope, *(options.answers * factor for factor in factors))
