"""Computes how many tokens a worker process gets in one batch: as many as the setting says, or fewer after its device ran out of memory."""

from __future__ import annotations

# The budget becomes this share of a batch that did not fit.
SHRINK = 3 / 4
GROW = 5 / 4
# So many batches near the budget's size must fit in a row before it grows; twice as many after each failure, so that failures get rare.
GOOD_BATCHES = 16
MAX_GOOD_BATCHES = 4096


class BatchBudget:
    """Counter of the largest number of tokens that the next batch of one worker process may have.

    A batch that does not fit into the device's memory lowers the budget to three quarters of that batch's tokens. After enough batches in a
    row that fitted and had at least half as many tokens as the budget, the budget grows by a quarter, up to the setting. Smaller batches
    that fit do not count, since they prove nothing about memory.

    Attributes:
        tokens: the largest number of tokens of the next batch.
    """

    def __init__(self, max_tokens: int) -> None:
        self.tokens = max_tokens
        self._max_tokens = max_tokens
        self._needed = GOOD_BATCHES // 2
        self._good = 0

    def failed(self, tokens: int) -> None:
        """Lowers the largest number of tokens of the next batch, since a batch of ``tokens`` tokens did not fit into the device's
        memory.
        """
        self.tokens = max(1, min(self.tokens, int(tokens * SHRINK)))
        self._needed = min(2 * self._needed, MAX_GOOD_BATCHES)
        self._good = 0

    def fitted(self, tokens: int) -> None:
        """Records that a batch of ``tokens`` tokens fitted into the device's memory, and raises the largest number of tokens of a batch
        after enough such batches.
        """
        if self.tokens == self._max_tokens or 2 * tokens < self.tokens:
            return
        self._good += 1
        if self._good >= self._needed:
            self.tokens = min(self._max_tokens, max(self.tokens + 1, int(self.tokens * GROW)))
            self._good = 0
