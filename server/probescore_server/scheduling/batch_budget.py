"""How many tokens a worker gets at a time: the setting, or less once its device ran out of memory."""

from __future__ import annotations

# Of the batch that did not fit.
SHRINK = 3 / 4
GROW = 5 / 4
# Batches at the budget's size that must fit in a row before it grows; twice as many after each failure, so that failures get rare.
GOOD_BATCHES = 16
MAX_GOOD_BATCHES = 4096


class BatchBudget:
    """The budget of one worker.

    A batch that does not fit lowers it to three quarters of that batch. It grows by a quarter, up to the setting, after enough batches in
    a row that used at least half of it and fitted. Nothing smaller says anything of memory.

    Attributes:
        tokens: of the next batch.
    """

    def __init__(self, max_tokens: int) -> None:
        self.tokens = max_tokens
        self._max_tokens = max_tokens
        self._needed = GOOD_BATCHES // 2
        self._good = 0

    def failed(self, tokens: int) -> None:
        """A batch of so many tokens did not fit."""
        self.tokens = max(1, min(self.tokens, int(tokens * SHRINK)))
        self._needed = min(2 * self._needed, MAX_GOOD_BATCHES)
        self._good = 0

    def fitted(self, tokens: int) -> None:
        """A batch of so many tokens fitted."""
        if self.tokens == self._max_tokens or 2 * tokens < self.tokens:
            return
        self._good += 1
        if self._good >= self._needed:
            self.tokens = min(self._max_tokens, max(self.tokens + 1, int(self.tokens * GROW)))
            self._good = 0
