"""``client.activations`` on a scripted server: order, retries, formats, and answers that break the contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import grpc
import numpy as np
import pytest
from scripted_server import (
    TAPS,
    WIDTH,
    Refusal,
    Service,
    activations_of,
    group,
    pooled,
    queue_full,
    read_parts,
    read_views,
    reading_server,
    unavailable,
)

from probescore import Completion, CompletionActivations, Pool, RolloutGroup, Scope, Span, Text
from probescore.errors import InvalidRequestError, MismatchError, OverloadedError, ServerError
from probescore.types import CompletionStatus
from probescore.v1 import activations_pb2, scoring_pb2, tensor_pb2

POOLS = ("tokens", "mean", "last", "max")
ASKED = [
    RolloutGroup([1, 2], [Completion([3, 4, 5], mask=[1, 0, 1], spans=(Span("a", 0, 2), Span("none", 1, 2)), id="one"), []]),
    RolloutGroup([], [Completion([6], follow_ups=(Completion([7, 8], follow_ups=(Completion([9]),)), Completion([])))]),
    RolloutGroup(Text("ab"), ["cd"]),
]


@pytest.fixture
def service() -> Service:
    return Service(script=[reading_server])


def check(found: CompletionActivations, asked: RolloutGroup, scope: Scope) -> None:
    views = {path: view for path, *view in read_views(asked.completions[found.completion_index], asked, scope)}

    def tree(read: CompletionActivations, path: tuple[int, ...]) -> None:
        completion, before, own, selections, _ = views.pop(path)
        ids = np.concatenate([before, own])
        assert (read.id, read.status, read.prompt_tokens) == (completion.id, CompletionStatus.OK, len(before))
        np.testing.assert_array_equal(read.token_ids, ids)
        np.testing.assert_array_equal(read.selections, np.stack(selections))
        assert read.spans == tuple(span.name for span in completion.spans)
        for number, tap in enumerate(TAPS):
            rows = activations_of(ids, number)
            np.testing.assert_array_equal(read.tokens[tap], rows)
            expected = [[pooled(rows, selection, Pool(pool)) for pool in POOLS[1:]] for selection in selections]
            np.testing.assert_array_equal(read.pooled[tap], np.array(expected, np.float32))
        for index, follow_up in enumerate(read.follow_ups):
            tree(follow_up, (*path, index))

    tree(found, ())
    assert not views


@pytest.mark.parametrize("scope", [Scope.COMPLETION, Scope.ALL])
@pytest.mark.parametrize("bytes_per_call", [1, 300, 1 << 30])
def test_results_come_in_order_however_they_are_sent(client: Any, service: Service, bytes_per_call: int, scope: Scope) -> None:
    asked = [
        RolloutGroup(each.prompt, [Completion(one) if not isinstance(one, Completion) else one for one in each.completions])
        for each in ASKED
    ]
    found = [*client.activations(iter(asked), "*", pool=POOLS, scope=scope, bytes_per_call=bytes_per_call)]
    assert [(one.group_index, one.completion_index) for one in found] == [(0, 0), (0, 1), (1, 0), (2, 0)]
    for one in found:
        check(one, asked[one.group_index], scope)
    assert [one.inexact_ids for one in found] == [False, False, False, True]
    reads = [request for request in service.requests if isinstance(request, activations_pb2.ReadActivationsRequest)]
    assert len(reads) == (1 if bytes_per_call > 300 else 4 if bytes_per_call == 1 else len(reads))


def test_groups_are_read_no_further_than_one_call_ahead(client: Any) -> None:
    read = []

    def endless() -> Iterator[RolloutGroup]:
        while True:
            read.append(len(read))
            yield group([5, 6])

    found = client.activations(endless(), TAPS[0], bytes_per_call=2 * WIDTH * 4)
    assert [one.group_index for one in islice(found, 3)] == [0, 1, 2]
    assert len(read) <= 5
    found.close()


def test_bfloat16_arrives_as_float32(client: Any) -> None:
    (found,) = client.activations([group([300, 5])], TAPS[1], dtype="bfloat16")
    assert found.tokens[TAPS[1]].dtype == np.float32
    np.testing.assert_array_equal(found.tokens[TAPS[1]][1], [5, 10, 15])
    np.testing.assert_allclose(found.tokens[TAPS[1]], activations_of([300, 5], 0), rtol=2**-8)


@pytest.mark.parametrize("failure", [unavailable(), queue_full()])
def test_a_call_is_tried_again(client: Any, service: Service, failure: Refusal) -> None:
    service.script += [failure, failure]
    assert len([*client.activations([group([5], [6])], "*")]) == 2


def test_only_what_is_missing_is_asked_again(client: Any, service: Service) -> None:
    def breaks_off(request: Any) -> Iterator[Any]:
        messages = [*read_parts(request)]
        yield from messages[: len(messages) // 2 + 1]  # the last completion, and a part of the one before
        raise unavailable()

    service.script.append(breaks_off)
    asked = [group([5, 6], [7, 8])]
    found = [*client.activations(asked, "*", pool=POOLS)]
    for one in found:
        check(one, RolloutGroup([1, 2], [Completion([5, 6]), Completion([7, 8])]), Scope.COMPLETION)
    reads = [request for request in service.requests if isinstance(request, activations_pb2.ReadActivationsRequest)]
    assert [len(request.groups[0].completions) for request in reads] == [2, 1]


def test_a_refusal_names_the_place_in_what_was_given(client: Any, service: Service) -> None:
    from google.rpc import error_details_pb2
    from scripted_server import error_info

    violation = error_details_pb2.BadRequest.FieldViolation(field="groups[0].completions[0].ids", description="is wrong")
    details = (error_info("INVALID_REQUEST"), error_details_pb2.BadRequest(field_violations=[violation]))
    service.script += [read_parts, Refusal(grpc.StatusCode.INVALID_ARGUMENT, "groups[0].completions[0].ids: is wrong", details)]
    found = client.activations([group([5], [6])], TAPS[0], bytes_per_call=1)
    next(found)
    with pytest.raises(InvalidRequestError) as refusal:
        next(found)
    assert refusal.value.field == "groups[0].completions[1].ids"


def test_a_server_that_gives_none_is_told_at_once(client: Any, service: Service) -> None:
    service.script.clear()
    with pytest.raises(ServerError, match="its setting allow_activations names no taps") as refusal:
        next(client.activations([group([5])], "*"))
    assert refusal.value.reason == "ACTIVATIONS_OFF"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"taps": "resid_post.9"}, "taps[0]"),
        ({"taps": []}, "taps"),
        ({"pool": "sum"}, "pool"),
        ({"dtype": "int8"}, "dtype"),
        ({"scope": "x"}, "scope"),
    ],
)
def test_what_cannot_be_read_is_refused_without_a_call(client: Any, service: Service, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        next(client.activations([group([5])], **{"taps": "*", **options}))
    assert refusal.value.field == field
    assert not any(isinstance(request, activations_pb2.ReadActivationsRequest) for request in service.requests)


def test_another_model_is_a_mismatch(client: Any) -> None:
    with pytest.raises(MismatchError):
        next(client.activations([group([5])], "*", expected_model_fingerprint="sha256:other"))


def changed(change: Callable[[list[Any]], None]) -> Callable[[Any], Iterator[Any]]:
    def answer(request: Any) -> Iterator[Any]:
        messages = [*read_parts(request)]
        change(messages)
        return iter(messages)

    return answer


def _set(index: int, path: str, value: Any) -> Callable[[list[Any]], None]:
    def change(messages: list[Any]) -> None:
        message = messages[index]
        *parents, last = path.split(".")
        for parent in parents:
            message = message[int(parent)] if parent.isdigit() else getattr(message, parent)
        if isinstance(value, list):
            del getattr(message, last)[:]
            getattr(message, last).extend(value)
        elif isinstance(value, tensor_pb2.Tensor):
            getattr(message, last).CopyFrom(value)
        else:
            setattr(message, last, value)

    return change


def _floats(*rows: list[float]) -> tensor_pb2.Tensor:
    array = np.array(rows, "<f4")
    return tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=array.shape, data=array.tobytes())


# Of one completion of two tokens at two taps the messages are: begins; tokens 0, 1 and the mean at the first tap; the same at the second.
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda messages: messages.pop(), "ended without 1 of its completions"),
        (lambda messages: messages.pop(1), "row 0 of mlp_out.0"),
        (lambda messages: messages.pop(0), "has rows before any completion has begun"),
        (lambda messages: messages.insert(1, messages[1]), "row 1 of mlp_out.0"),
        (lambda messages: messages.append(messages[-1]), "has rows before any completion has begun"),
        (lambda messages: messages.append(messages[0]), "was not asked for, or answered before"),
        (lambda messages: messages.insert(2, messages[0]), "begins before the rows of the one before are there"),
        (_set(0, "parts.0.begins.group_index", 3), "was not asked for, or answered before"),
        (_set(0, "parts.0.begins.id", "other"), "is 'other'; '' was asked for"),
        (_set(0, "parts.0.begins.follow_up", [0]), r"is \[0\]; \[\] was to come"),
        (_set(0, "parts.0.begins.status", 0), "unknown value 0"),
        (_set(0, "parts.0.begins.prompt_tokens", 1), "ids that are not the"),
        (_set(0, "parts.0.begins.prompt_tokens", 9), "is 9, of 2 tokens"),
        (_set(1, "parts.0.rows.tap", "resid_post.1"), "was to come"),
        (_set(1, "parts.0.rows.rows", _floats([1, 2])), "has shape"),
        (_set(1, "parts.0.rows.rows", _floats([1, 2, 3], [1, 2, 3], [1, 2, 3])), "has shape"),
        (_set(1, "parts.0.rows.rows", _floats([1, np.inf, 3])), "not finite in row 0"),
        (_set(3, "parts.0.rows.rows", _floats([np.nan] * 3)), "none where tokens count"),
        (_set(2, "info.dtype", 6), "info.dtype"),
        (_set(2, "info.taps", ["mlp_out.0"]), "info.taps"),
        (_set(2, "info.pools", [1]), "info.pools"),
        (_set(2, "info.model_fingerprint", ""), "info.model_fingerprint"),
        (_set(2, "info.model_fingerprint", "sha256:another"), "another than in the call's first message"),
    ],
)
def test_an_answer_that_breaks_the_contract_is_refused(client: Any, service: Service, change: Any, problem: str) -> None:
    service.script.append(changed(change))
    with pytest.raises(ServerError, match=problem) as refusal:
        [*client.activations([group([5, 6])], "*", pool=("tokens", "mean"))]
    assert refusal.value.reason == "MALFORMED_ANSWER"


def of_reading(**fields: object) -> Callable[[Any], Iterator[Any]]:
    """Answers as a server that knows readings."""
    told = {"name": "policy", "id": "sha256:1", "kind": scoring_pb2.READING_KIND_ADAPTER, **fields}

    def change(messages: list[Any]) -> None:
        for message in messages:
            message.info.reading.CopyFrom(scoring_pb2.Reading(**told))

    return changed(change)


def test_an_answer_says_whose_activations_it_has(client: Any, service: Service) -> None:
    service.script.append(of_reading(step=7))
    (found,) = client.activations([group([5, 6])], "*", reading="policy")
    assert (found.reading.name, found.reading.id, found.reading.step) == ("policy", "sha256:1", 7)
    assert service.requests[-1].reading == "policy"
    service.script.append(reading_server)
    (plain,) = client.activations([group([5, 6])], "*")
    assert plain.reading is None


def test_a_server_that_knows_no_readings_is_noticed(client: Any, service: Service) -> None:
    for name in ("policy", "frozen"):
        service.script = [reading_server]
        with pytest.raises(ServerError, match=f"does not know readings, and has read the frozen model instead of {name}") as failed:
            [*client.activations([group([5, 6])], "*", reading=name)]
        assert failed.value.reason == "READINGS_IGNORED"


@pytest.mark.parametrize(
    ("fields", "asked", "problem"),
    [
        ({"name": "other"}, "policy", "info.reading: is other; policy was asked for"),
        ({}, "", "info.reading: is policy; none was asked for"),
        ({"id": ""}, "policy", "info.reading.id: is empty"),
        ({"kind": scoring_pb2.READING_KIND_FROZEN}, "policy", "info.reading.kind"),
        ({"kind": 9}, "policy", "info.reading.kind"),
        ({"name": "frozen", "kind": scoring_pb2.READING_KIND_FROZEN}, "frozen", "info.reading.id: is sha256:1; for the frozen model"),
    ],
)
def test_an_answer_of_another_reading_is_refused(client: Any, service: Service, fields: dict[str, Any], asked: str, problem: str) -> None:
    service.script.append(of_reading(**fields))
    with pytest.raises(ServerError, match=problem) as refusal:
        [*client.activations([group([5, 6])], "*", reading=asked)]
    assert refusal.value.reason == "MALFORMED_ANSWER"


def test_versions_are_not_mixed_in_a_call_that_is_resumed(client: Any, service: Service) -> None:
    def one_then_lost(request: Any) -> Iterator[Any]:
        yield from islice(of_reading()(request), 7)  # the last completion
        raise unavailable()

    service.script += [one_then_lost, of_reading(id="sha256:2", step=8)]
    with pytest.raises(MismatchError, match="came to mean sha256:2 of step 8 instead of sha256:1 during the call") as failed:
        [*client.activations([group([5, 6], [7, 8])], "*", pool=("tokens", "mean"), reading="policy")]
    assert failed.value.reason == "READING_CHANGED"


def test_an_empty_selection_must_be_absent(client: Any, service: Service) -> None:
    service.script.append(changed(_set(-1, "parts.0.rows.rows", _floats([0, 0, 0]))))
    with pytest.raises(ServerError, match="has numbers where no token counts"):
        [*client.activations([RolloutGroup([1], [Completion([5], mask=[0])])], "*", pool="mean")]


def test_no_more_is_tried_than_the_budget_allows(client_class: Any, address: str, service: Service) -> None:
    service.script += [queue_full(0.05)] * 50
    with client_class(address, restart_budget=0.2) as client, pytest.raises(OverloadedError):
        next(client.activations([group([5])], "*"))
