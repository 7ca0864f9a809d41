"""What one batch finished is sent in messages of bounded size."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from probescore.types import CompletionScores, CompletionStatus, ProbeScores, Usage
from probescore_server.front.scoring_service import MAX_STREAMED_BYTES, _bytes_of, _pieces
from probescore_server.rollouts import RolloutResult
from probescore_server.scheduling.call import Delivery, FinishedRollout

FLOATS = MAX_STREAMED_BYTES // 4  # of float32 that fill a message


def finished(index: int, floats: int) -> FinishedRollout:
    scores = {"probe": ProbeScores(np.zeros((1, 1, 1), np.float32), np.zeros((floats, 1), np.float32))}
    return FinishedRollout(0, index, RolloutResult(CompletionScores("", CompletionStatus.OK, scores), Usage()))


@given(st.lists(st.sampled_from([1, FLOATS // 3, FLOATS - 1, FLOATS + 1]), max_size=8))
def test_every_answer_is_in_one_piece_in_order_and_only_a_single_one_may_exceed_the_bound(sizes: list[int]) -> None:
    delivery = Delivery(tuple(finished(index, floats) for index, floats in enumerate(sizes)), compute_seconds=0.0, tokens=0)
    pieces = list(_pieces(delivery))
    assert [one.completion for piece in pieces for one in piece] == list(range(len(sizes)))
    for piece in pieces:
        assert len(piece) == 1 or sum(_bytes_of(one.result.scores) for one in piece) <= MAX_STREAMED_BYTES
