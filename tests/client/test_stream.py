"""``score_stream``: every completion once, whatever happens on the way, and never more under way than the window says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import Refusal, Service, answer_in_pieces, error_info, group, queue_full, serving, unavailable

from probescore import (
    AsyncProbeClient,
    Chat,
    ChatMessage,
    Completion,
    DeadlineExceededError,
    FieldViolation,
    InvalidRequestError,
    ProbeClient,
    ProbescoreError,
    RolloutGroup,
    ServerError,
    StreamWindow,
    Text,
    UnavailableError,
)
from probescore._group_sources import GroupRead, SourceEnded
from probescore._streaming import ScoreChunk, StreamSchedule
from probescore.v1 import scoring_pb2
from probescore.wire import groups_from_request


def numbered(count: int, completions: int = 3) -> list[RolloutGroup]:
    """Groups whose completions have a different sum each: 100 × group + completion."""
    return [group(*([100 * index + position] for position in range(completions))) for index in range(count)]


def scores(stream: Any) -> dict[tuple[int, int], float]:
    """Score by place; fails if a place is answered twice."""
    found: dict[tuple[int, int], float] = {}
    for answer in stream:
        place = (answer.group_index, answer.completion_index)
        assert place not in found
        found[place] = answer.scores["sum"].value
    return found


def expected(count: int, completions: int = 3) -> dict[tuple[int, int], float]:
    return {(index, position): 100 * index + position for index in range(count) for position in range(completions)}


def chunks(groups: list[RolloutGroup], window: StreamWindow) -> Iterator[ScoreChunk]:
    """How a source that never waits is cut into calls, when each is answered before the next."""
    schedule, source = StreamSchedule(window), iter(groups)
    while not schedule.finished:
        if schedule.wants_group():
            schedule.accept(next(map(GroupRead, source), SourceEnded()))
        while (chunk := schedule.next_chunk()) is not None:
            yield chunk
            schedule.accept(chunk)
    if schedule.failure is not None:
        raise schedule.failure


SMALL = StreamWindow(groups_per_call=2, tokens_per_call=1000, calls_in_flight=3)


def test_every_completion_is_answered_once(client: Any) -> None:
    assert scores(client.score_stream(numbered(25), window=SMALL)) == expected(25)


def test_an_empty_stream_has_no_answers(client: Any, service: Service) -> None:
    assert scores(client.score_stream([])) == {}
    assert service.requests == []


def test_each_answer_says_what_produced_it(client: Any) -> None:
    assert next(client.score_stream(numbered(1))).info.model_fingerprint == "sha256:model"


def test_a_call_holds_no_more_than_the_window_says(client: Any, service: Service) -> None:
    scores(client.score_stream(numbered(7), window=SMALL))

    sizes = [len(request.groups) for request in service.requests]
    assert max(sizes) <= 2
    assert sum(sizes) == 7


def test_an_endless_stream_is_read_no_further_than_the_window(client: Any) -> None:
    read = 0

    def endless() -> Iterator[RolloutGroup]:
        nonlocal read
        while True:
            read += 1
            yield group([read])

    stream = client.score_stream(endless(), window=SMALL)
    for seen in range(1, 40):
        next(stream)
        # 3 calls of 2 groups, and one group that showed that the last call was full
        assert read <= seen + 3 * 2 + 1
    stream.close()


def test_a_reader_that_stops_early_ends_the_calls(client: Any, service: Service) -> None:
    ended = threading.Semaphore(0)

    def until_cancelled(request: Any) -> Iterator[Any]:
        try:
            yield from answer_in_pieces(request)
            while True:
                yield scoring_pb2.ScoreStreamResponse()
        finally:
            ended.release()

    service.script = [until_cancelled] * 3
    stream = client.score_stream(numbered(20), window=SMALL)
    next(stream)

    stream.close()

    for _ in range(len(service.requests)):
        assert ended.acquire(timeout=20)


# ------------------------------------------------------------------------------------------------------------------ failures


def breaks_after(answered: int, refusal: Refusal) -> Any:
    """Answers so many completions, then fails."""

    def act(request: Any) -> Iterator[Any]:
        for message, _ in zip(answer_in_pieces(request), range(answered), strict=False):
            yield message
        raise refusal

    return act


@pytest.mark.parametrize("answered", [0, 1, 4, 5])
@pytest.mark.parametrize("refusal", [unavailable(), queue_full()], ids=["unavailable", "queue full"])
def test_only_what_is_missing_is_asked_for_again(client: Any, service: Service, answered: int, refusal: Refusal) -> None:
    window = StreamWindow(groups_per_call=2, calls_in_flight=1)
    service.script = [breaks_after(answered, refusal)]

    assert scores(client.score_stream(numbered(2), window=window)) == expected(2)

    again = [completion for sent in groups_from_request(service.requests[-1]) for completion in sent.completions]
    assert len(again) == 6 - answered


def test_a_stream_that_fails_after_its_last_answer_has_not_failed(client_class: Any, address: str, service: Service) -> None:
    service.script = [breaks_after(6, unavailable())]
    with client_class(address, restart_budget=0) as client:
        assert scores(client.score_stream(numbered(2))) == expected(2)
    assert len(service.requests) == 1


def test_an_error_does_not_wait_for_a_call_that_pauses(client_class: Any, address: str, service: Service) -> None:
    # given a call that is asked to come back after the time limit of this test, and another that fails for good
    paused = threading.Event()

    def fail_once_the_other_pauses(request: Any) -> Iterator[Any]:
        paused.wait(20)
        raise Refusal(grpc.StatusCode.INTERNAL, "broken")
        yield

    def pause(request: Any) -> Iterator[Any]:
        paused.set()
        raise queue_full(retry_seconds=1000)
        yield

    service.script = [pause, fail_once_the_other_pauses]
    with client_class(address, timeout=3000, restart_budget=2000) as client, pytest.raises(ServerError, match="broken"):
        scores(client.score_stream(numbered(4), window=SMALL))


@pytest.mark.parametrize("seed", range(4))
def test_every_completion_is_answered_once_however_often_calls_break(client: Any, service: Service, seed: int) -> None:
    random = np.random.default_rng(seed)
    service.script = [breaks_after(int(answered), unavailable(0.001)) for answered in random.integers(0, 6, 30)]

    assert scores(client.score_stream(numbered(20), window=SMALL)) == expected(20)


def test_a_server_that_dies_mid_stream_and_comes_back_loses_nothing(client_class: Any) -> None:
    holding = threading.Event()
    restarted = threading.Event()

    def one_then_hold(request: Any) -> Iterator[Any]:
        yield next(answer_in_pieces(request))
        holding.set()
        restarted.wait(30)

    first, second = Service([one_then_hold]), Service()
    with serving(first) as address:
        client = client_class(address, timeout=60, restart_budget=50)
        client.__enter__()
        stream = client.score_stream(numbered(3), window=StreamWindow(calls_in_flight=1))
        found = [next(stream)]
        assert holding.wait(20)
    restarted.set()
    with serving(second, address):
        found += stream
        client.__exit__(None, None, None)

    assert scores(found) == expected(3)
    assert len(second.requests) == 1


def test_a_server_that_stays_away_is_an_error_not_an_end(client_class: Any, service: Service) -> None:
    with serving(service) as address:
        pass
    with client_class(address, restart_budget=0.3) as client, pytest.raises(UnavailableError):
        scores(client.score_stream(numbered(9), window=SMALL))


def test_each_call_of_a_stream_has_a_deadline(client: Any, service: Service) -> None:
    release = threading.Event()

    def hang(request: Any) -> Iterator[Any]:
        release.wait(20)
        yield from ()

    service.script = [hang]
    with pytest.raises(DeadlineExceededError):
        scores(client.score_stream(numbered(1), timeout=0.2))
    release.set()


def test_a_refused_field_is_named_by_its_place_in_the_stream(client: Any, service: Service) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="groups[1].completions[2].mask", description="has 3 entries")
    refusal = Refusal(
        grpc.StatusCode.INVALID_ARGUMENT,
        "groups[1].completions[2].mask: has 3 entries",
        (error_info("INVALID_REQUEST"), error_details_pb2.BadRequest(field_violations=[violation])),
    )
    service.script = [answer_in_pieces, refusal]

    with pytest.raises(InvalidRequestError) as raised:
        scores(client.score_stream(numbered(4), window=StreamWindow(groups_per_call=2, calls_in_flight=1)))

    assert raised.value.field == "groups[3].completions[2].mask"
    assert str(raised.value) == "groups[3].completions[2].mask: has 3 entries"


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        ("groups[0].prompt", "groups[5].prompt"),
        ("groups[0].completions[1].follow_ups[0].ids", "groups[5].completions[3].follow_ups[0].ids"),
        ("groups[7].prompt", "groups[7].prompt"),
        ("run_id", "run_id"),
    ],
)
def test_a_field_of_a_call_is_found_in_the_stream(sent: str, named: str) -> None:
    # given a call for completions 2 and 3 of group 5
    [chunk] = chunks(numbered(6, completions=4)[5:], StreamWindow())
    chunk.prompts = {5: chunk.prompts[0]}
    chunk.missing = {(5, position): chunk.missing[0, position] for position in (2, 3)}
    chunk.request(scoring_pb2.ScoreRequest())

    error = chunk.relocated(InvalidRequestError("", violations=(FieldViolation(sent, "wrong"),)))

    assert error.field == named


@pytest.mark.parametrize(
    ("bad", "field"),
    [(RolloutGroup([0.5], [[1]]), "groups[3].prompt.ids"), (RolloutGroup([1], []), "groups[3].completions")],
)
def test_a_group_that_cannot_be_sent_is_named_by_its_place_in_the_stream(client: Any, bad: RolloutGroup, field: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        scores(client.score_stream([*numbered(3), bad], window=SMALL))
    assert raised.value.field == field


def ends_early(request: Any) -> Iterator[Any]:
    yield next(answer_in_pieces(request))


def answers_twice(request: Any) -> Iterator[Any]:
    yield from answer_in_pieces(request)
    yield next(answer_in_pieces(request))


def answers_what_was_not_asked(request: Any) -> Iterator[Any]:
    message = next(answer_in_pieces(request))
    message.completions[0].group_index = 9
    yield message


def says_nothing_sensible(request: Any) -> Iterator[Any]:
    yield scoring_pb2.ScoreStreamResponse(completions=[scoring_pb2.StreamedCompletion()])


@pytest.mark.parametrize(
    ("behaviour", "problem"),
    [
        (ends_early, "the stream ended without 5 of its completions"),
        (answers_twice, r"groups\[1\].completions\[2\] was not asked for, or answered before"),
        (answers_what_was_not_asked, r"groups\[9\].completions\[2\] was not asked for, or answered before"),
        (says_nothing_sensible, r"completions\[0\].scores.status: unknown value 0"),
    ],
)
def test_a_server_that_breaks_the_contract_is_found_out(client: Any, service: Service, behaviour: Any, problem: str) -> None:
    service.script = [behaviour]
    with pytest.raises(ServerError, match=problem):
        scores(client.score_stream(numbered(2)))


def test_what_goes_wrong_while_groups_are_made_reaches_the_reader(client: Any) -> None:
    def breaking() -> Iterator[RolloutGroup]:
        yield group([1])
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        scores(client.score_stream(breaking()))


# ----------------------------------------------------------------------------------------------------------------- cutting up


def test_a_group_too_large_for_a_call_is_sent_in_parts_with_its_prompt(client: Any, service: Service) -> None:
    # given a prompt of 2 tokens and 10 completions of 4, where a call may hold 10
    large = group(*([position] * 4 for position in range(10)))

    found = scores(client.score_stream([large], window=StreamWindow(tokens_per_call=10)))

    assert found == {(0, position): 4 * position for position in range(10)}
    assert sorted(len(request.groups[0].completions) for request in service.requests) == [2] * 5
    assert all(groups_from_request(request)[0].prompt.tolist() == [1, 2] for request in service.requests)


sizes = st.lists(st.tuples(st.integers(0, 6), st.lists(st.integers(0, 6), min_size=1, max_size=5)), max_size=8)


@given(sizes, st.integers(1, 4), st.integers(1, 20))
def test_chunks_hold_everything_once_in_order_and_within_bounds(lengths: list[Any], groups_per_call: int, tokens_per_call: int) -> None:
    groups = [RolloutGroup([0] * prompt, [[0] * size for size in completions]) for prompt, completions in lengths]

    cut = list(chunks(groups, StreamWindow(groups_per_call, tokens_per_call)))

    places = [(index, position) for index, (_, completions) in enumerate(lengths) for position in range(len(completions))]
    assert [place for chunk in cut for place in chunk.missing] == places
    for chunk in cut:
        prompts = sum(lengths[index][0] for index in {index for index, _ in chunk.missing})
        assert chunk.tokens == prompts + sum(lengths[index][1][position] for index, position in chunk.missing)
        assert len(chunk.prompts) <= groups_per_call
        assert chunk.tokens <= tokens_per_call or len(chunk.missing) == 1


@pytest.mark.parametrize(
    ("prompt", "tokens"), [([1, 2], 2), ("four", 4), (Text("four!"), 5), (Chat((ChatMessage("user", "ab"), ChatMessage("user", "c"))), 3)]
)
def test_a_chunk_counts_ids_and_the_characters_of_texts(prompt: Any, tokens: int) -> None:
    completion = Completion([1, 2, 3], follow_ups=(Completion("five!", follow_ups=(Completion([1]),)),))

    [chunk] = chunks([RolloutGroup(prompt, [completion])], StreamWindow())

    assert chunk.tokens == tokens + 3 + 5 + 1


@pytest.mark.parametrize("name", ["groups_per_call", "tokens_per_call", "calls_in_flight"])
def test_a_window_lets_something_through(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        StreamWindow(**{name: 0})


# --------------------------------------------------------------------------------------------------------------- only one of two


async def test_the_async_client_takes_an_async_stream(address: str) -> None:
    async def generated() -> AsyncIterator[RolloutGroup]:
        for entry in numbered(7):
            yield entry

    async with AsyncProbeClient(address) as client:
        answers = [answer async for answer in client.score_stream(generated(), window=SMALL)]

    assert scores(answers) == expected(7)


class Finishes:
    """Answers in pieces of 1 MiB, far more than a connection holds for a reader that takes nothing, and says when all is sent."""

    def __init__(self) -> None:
        self.finished = threading.Event()

    def __call__(self, request: Any) -> Iterator[Any]:
        for message in answer_in_pieces(request):
            message.completions[0].scores.status_message = "x" * 2**20
            yield message
        self.finished.set()


def test_a_call_is_over_in_time_however_slow_the_reader(address: str, service: Service) -> None:
    behaviour = Finishes()
    service.script = [behaviour]
    with ProbeClient(address) as client:
        stream = client.score_stream(numbered(5))
        found = [next(stream)]
        assert behaviour.finished.wait(20)
        found += stream

    assert scores(found) == expected(5)


async def test_a_call_is_over_in_time_however_slow_the_async_reader(address: str, service: Service) -> None:
    behaviour = Finishes()
    service.script = [behaviour]
    async with AsyncProbeClient(address) as client:
        stream = client.score_stream(numbered(5))
        found = [await anext(stream)]
        assert await asyncio.to_thread(behaviour.finished.wait, 20)
        found += [answer async for answer in stream]

    assert scores(found) == expected(5)


@pytest.mark.parametrize("kind", [InvalidRequestError, ServerError])
def test_an_error_of_any_kind_names_its_rollout_by_its_place_in_the_stream(kind: type[ProbescoreError]) -> None:
    """Given four groups in two calls, and an error of the second call."""
    _, second = chunks(numbered(4), StreamWindow(groups_per_call=2))
    second.request(scoring_pb2.ScoreRequest())
    place = "groups[1].completions[0]"
    error = second.relocated(kind(f"{place}: lost", "INTERNAL", "WORKER_LOST_TWICE", (FieldViolation(place, f"{place} did it twice"),)))

    assert isinstance(error, kind)
    assert error.violations == (FieldViolation("groups[3].completions[0]", "groups[3].completions[0] did it twice"),)
    assert "groups[3].completions[0]" in str(error)
    assert "groups[1]" not in str(error)


def test_a_call_has_no_more_completions_and_follow_ups_than_the_window_says() -> None:
    asked = [RolloutGroup([1], [Completion([2], follow_ups=(Completion([3]),)) for _ in range(5)]) for _ in range(4)]
    found = list(chunks(asked, StreamWindow(completions_per_call=6)))

    assert sum(len(chunk.missing) for chunk in found) == 20
    assert all(2 * len(chunk.missing) <= 6 for chunk in found)
