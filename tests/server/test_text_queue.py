"""Texts of requests take turns; short ones never wait behind long ones; what is given up is not taken."""

from __future__ import annotations

import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from probescore.types import Chat, ChatMessage
from probescore_server.activity import TextBeingTokenised
from probescore_server.validation.texts import PendingText
from probescore_server.workers.text_queue import SHORT_BYTES, TextQueue, TokenisingLane

IDS = np.zeros(1, np.int32)
LONG = "x" * (SHORT_BYTES + 1)


def texts(number: int, *contents: str) -> list[PendingText]:
    return [PendingText(f"{number}.{index}", content) for index, content in enumerate(contents)]


def test_requests_take_turns_text_by_text() -> None:
    turns = TextQueue()
    turns.add(1, texts(1, "a", "b", "c"))
    turns.add(2, texts(2, "d", "e"))
    assert [turns.take(TokenisingLane.SHORT)[1].content for _ in range(5)] == ["a", "d", "b", "e", "c"]


def test_short_texts_have_a_lane_of_their_own() -> None:
    turns = TextQueue()
    turns.add(1, texts(1, LONG, "short"))
    turns.add(2, texts(2, "also short"))
    assert [turns.take(TokenisingLane.SHORT)[0] for _ in range(2)] == [1, 2]
    assert turns.take(TokenisingLane.LONG)[0] == 1


def test_a_request_is_done_with_its_last_text() -> None:
    turns = TextQueue()
    asked = texts(1, "a", LONG)
    turns.add(1, asked)
    assert turns.done(1, asked[1], IDS) is None
    assert turns.done(1, asked[0], IDS) == {"1.0": IDS, "1.1": IDS}
    assert not turns.drop(1)


def test_what_is_given_up_is_not_taken_and_nobody_is_told_of_it() -> None:
    turns = TextQueue()
    gone = texts(1, "a", "b", LONG)
    turns.add(1, gone)
    turns.add(2, texts(2, "c", LONG))
    taken = turns.take(TokenisingLane.SHORT)
    assert turns.drop(1)
    assert not turns.drop(1)
    assert turns.take(TokenisingLane.SHORT)[0] == turns.take(TokenisingLane.LONG)[0] == 2
    assert turns.done(1, taken[1], IDS) is None


def test_what_each_lane_has_in_hand_is_told_until_it_takes_another_whoever_left() -> None:
    turns = TextQueue()
    asked = [*texts(7, "ab", LONG), PendingText("chat", Chat((ChatMessage("user", "é"),)))]
    turns.add(7, asked)
    assert turns.in_hand() == (TextBeingTokenised(), TextBeingTokenised())
    turns.take(TokenisingLane.LONG)
    turns.take(TokenisingLane.SHORT)
    turns.done(7, asked[0], IDS)
    turns.drop(7)
    assert turns.in_hand() == (TextBeingTokenised(1, 7, 2), TextBeingTokenised(1, 7, len(LONG)))
    turns.add(8, asked[2:])
    turns.take(TokenisingLane.SHORT)
    assert turns.in_hand()[0] == TextBeingTokenised(2, 8, len("user") + 2, is_chat=True)
    threading.Thread(target=turns.take, args=(TokenisingLane.SHORT,), daemon=True).start()
    while turns.in_hand()[0].order:
        pass
    assert turns.in_hand() == (TextBeingTokenised(2), TextBeingTokenised(1, 7, len(LONG)))


def test_taking_waits_for_a_text() -> None:
    turns = TextQueue()
    taken: list[int] = []
    thread = threading.Thread(target=lambda: taken.append(turns.take(TokenisingLane.LONG)[0]), daemon=True)
    thread.start()
    turns.add(3, texts(3, "short"))
    turns.add(4, texts(4, LONG))
    thread.join(30)
    assert taken == [4]


@given(st.lists(st.lists(st.sampled_from(["x", LONG]), min_size=1, max_size=5), max_size=5), st.data())
def test_every_request_that_is_wanted_is_answered_once_with_all_of_its_ids(requests: list[list[str]], data: st.DataObject) -> None:
    turns = TextQueue()
    left = dict.fromkeys(TokenisingLane, 0)
    for number, contents in enumerate(requests):
        turns.add(number, texts(number, *contents))
        for content in contents:
            left[TokenisingLane.LONG if content == LONG else TokenisingLane.SHORT] += 1
    dropped = data.draw(st.sets(st.sampled_from(range(len(requests))))) if requests else set()
    for number in dropped:
        turns.drop(number)
        for content in requests[number]:
            left[TokenisingLane.LONG if content == LONG else TokenisingLane.SHORT] -= 1
    answered = {}
    while any(left.values()):
        lane = data.draw(st.sampled_from([lane for lane, count in left.items() if count]))
        left[lane] -= 1
        number, text = turns.take(lane)
        if (ids := turns.done(number, text, IDS)) is not None:
            assert number not in answered
            answered[number] = set(ids)
    assert answered == {
        number: {f"{number}.{index}" for index in range(len(contents))} for number, contents in enumerate(requests) if number not in dropped
    }
