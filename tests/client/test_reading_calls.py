"""Scores on several readings, and loading and unloading them on every server of a client. Each test runs on both clients."""

from __future__ import annotations

import pickle
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from scripted_server import (
    ReadingService,
    Refusal,
    Service,
    answer,
    answer_in_pieces,
    error_info,
    group,
    reading,
    refused,
    retry_info,
    serving,
    unavailable,
)

from probescore import (
    AuthenticationError,
    Completion,
    CompletionStatus,
    InvalidRequestError,
    MismatchError,
    RolloutGroup,
    ServerError,
    StreamWindow,
    UnavailableError,
)
from probescore.v1 import admin_pb2, scoring_pb2

BOTH = ("frozen", "policy")


@pytest.fixture
def service() -> ReadingService:
    return ReadingService(directories={"/step-1": "1", "/step-2": "2"}, named={"policy": reading("policy")})


@contextmanager
def several(client_class: Any, *services: Service, **options: Any) -> Iterator[tuple[Any, list[str]]]:
    with ExitStack() as open_servers:
        addresses = [open_servers.enter_context(serving(service)) for service in services]
        with client_class(addresses, timeout=20, **options) as client:
            yield client, addresses


def loaded_from(*services: ReadingService) -> list[str | None]:
    return [service.named["policy"].id if "policy" in service.named else None for service in services]


# ---------------------------------------------------------------------------------------------------------------------- scores


def test_scores_of_each_reading_come_apart(client: Any) -> None:
    result = client.score([group([1, 2], [3]), group([4])], readings=BOTH)

    assert result.values("sum").tolist() == [3, 3, 4]
    assert result.values("sum", reading="policy").tolist() == [30, 30, 40]
    first = result.groups[0][0]
    assert first["sum"].value == first.on("frozen")["sum"].value == 3
    assert first.on("policy")["sum"].value == first.readings["policy"]["sum"].value == 30
    assert [(each.name, each.id) for each in result.info.readings] == [("frozen", "sha256:model"), ("policy", "sha256:1")]


def test_a_request_without_readings_sends_none(client: Any, service: ReadingService) -> None:
    result = client.score([group([1, 2])])

    assert list(service.requests[0].readings) == []
    assert result.info.readings == ()
    assert result.values("sum").tolist() == [3]
    with pytest.raises(KeyError, match="no reading 'policy' in this answer; it has 'frozen'"):
        result.values("sum", reading="policy")


def test_without_frozen_there_are_no_frozen_scores(client: Any) -> None:
    result = client.score([group([1, 2])], readings="policy")

    assert result.values("sum", reading="policy").tolist() == [30]
    with pytest.raises(KeyError, match="no reading 'frozen' in this answer; it has 'policy'"):
        result.values("sum")
    with pytest.raises(KeyError):
        result.groups[0][0]["sum"]


def test_follow_ups_and_tokens_have_each_reading(client: Any) -> None:
    result = client.score([RolloutGroup([1], [Completion([2, 3], follow_ups=(Completion([4]),))])], readings=BOTH, token_scores=True)

    follow_up = result.groups[0][0].follow_ups[0]
    assert (follow_up["sum"].value, follow_up.on("policy")["sum"].value) == (4, 40)
    assert np.array_equal(result.groups[0][0].on("policy")["sum"].tokens, [[20], [30]])


def test_a_reading_on_which_a_completion_has_no_score_is_nan_there_alone(client: Any, service: ReadingService) -> None:
    def broken(request: Any) -> Any:
        message = answer(request)
        own = message.groups[0].completions[0].readings[0]
        own.Clear()
        own.status, own.status_message = scoring_pb2.COMPLETION_STATUS_NON_FINITE, "the model gave NaN"
        return message

    service.script = [broken]
    result = client.score([group([1, 2], [3])], readings=BOTH)

    assert result.values("sum").tolist() == [3, 3]
    np.testing.assert_array_equal(result.values("sum", reading="policy"), [np.nan, 30])
    own = result.groups[0][0].on("policy")
    assert (own.status, own.status_message) == (CompletionStatus.NON_FINITE, "the model gave NaN")
    with pytest.raises(KeyError, match="the model gave NaN"):
        own["sum"]


def test_the_stream_has_each_reading_too(client: Any) -> None:
    scores = {each.group_index: each.scores for each in client.score_stream([group([1]), group([2])], readings=BOTH)}

    assert {index: (each["sum"].value, each.on("policy")["sum"].value) for index, each in scores.items()} == {0: (1, 10), 1: (2, 20)}


@pytest.mark.parametrize(
    ("readings", "field", "problem"),
    [
        (["frozen", "a b"], "readings[1]", "letter or digit"),
        ([""], "readings[0]", "letter or digit"),
        (["x" * 65], "readings[0]", "1 to 64"),
        (["policy\n"], "readings[0]", "letter or digit"),
        (["policy", "frozen", "policy"], "readings[2]", "policy appears twice"),
        ([3], "readings[0]", "'3'"),
    ],
)
def test_a_name_that_no_reading_has_is_refused_at_once(client: Any, service: Service, readings: Any, field: str, problem: str) -> None:
    for call in (client.score, lambda groups, **chosen: list(client.score_stream(groups, **chosen))):
        with pytest.raises(InvalidRequestError, match=problem) as raised:
            call([group([1])], readings=readings)
        assert raised.value.field == field
    assert service.requests == []


# --------------------------------------------------------------------------------------------------------------------- answers


def ignored(message: Any) -> None:
    message.info.ClearField("readings")
    for each in message.groups:
        for completion in each.completions:
            completion.ClearField("readings")


def test_a_server_that_knows_no_readings_is_noticed(client: Any, service: ReadingService) -> None:
    def old(request: Any) -> Any:
        message = answer(request)
        ignored(message)
        return message

    def old_in_pieces(request: Any) -> Any:
        request.ClearField("readings")
        return answer_in_pieces(request)

    for readings in (["policy"], ["frozen"], BOTH):
        service.script = [old if readings != ["policy"] else lambda request: (request.ClearField("readings"), answer(request))[1]]
        with pytest.raises(ServerError, match="does not know readings, and has scored the frozen model") as failed:
            client.score([group([1])], readings=readings)
        assert failed.value.reason == "READINGS_IGNORED"
    service.script = [old_in_pieces]
    with pytest.raises(ServerError, match="has scored the frozen model instead of policy"):
        list(client.score_stream([group([1])], readings="policy"))


def wrong(change: Any) -> Any:
    def act(request: Any) -> Any:
        message = answer(request)
        change(message)
        return message

    return act


def swap_names(message: Any) -> None:
    first, second = (scoring_pb2.Reading.FromString(each.SerializeToString()) for each in message.info.readings)
    message.info.readings[0].CopyFrom(second)
    message.info.readings[1].CopyFrom(first)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (swap_names, "info.readings"),
        (lambda message: message.info.readings[1].ClearField("id"), r"info\.readings\[1\]\.id"),
        (lambda message: setattr(message.info.readings[0], "id", "sha256:else"), r"info\.readings\[0\]\.id"),
        (lambda message: setattr(message.info.readings[1], "kind", scoring_pb2.READING_KIND_FROZEN), r"info\.readings\[1\]\.kind"),
        (lambda message: setattr(message.info.readings[1], "kind", 9), r"info\.readings\[1\]\.kind"),
        (lambda message: setattr(message.info.readings[1], "name", "other"), "info.readings"),
        (lambda message: message.info.readings.pop(), r"completions\[0\]\.readings"),
        (lambda message: message.groups[0].completions[0].readings.pop(), r"completions\[0\]\.readings"),
        (lambda message: message.groups[0].completions[0].readings[0].scores.pop(), r"readings\[0\]\.scores"),
        (lambda message: message.groups[0].completions[0].scores.pop(), r"completions\[0\]\.scores"),
        (lambda message: message.groups[0].completions[0].readings[0].scores[0].ClearField("reduced"), r"readings\[0\]\.scores\[0\]"),
    ],
)
def test_an_answer_that_does_not_match_is_refused(client: Any, service: ReadingService, change: Any, field: str) -> None:
    service.script = [wrong(change)]
    with pytest.raises(ServerError, match=field) as failed:
        client.score([group([1])], readings=BOTH)
    assert failed.value.reason == "MALFORMED_ANSWER"


def test_readings_that_nobody_asked_for_are_refused(client: Any, service: ReadingService) -> None:
    def too_many(request: Any) -> Any:
        request.readings.extend(BOTH)
        return answer(request)

    service.script = [too_many]
    with pytest.raises(ServerError, match=r"info\.readings: is frozen, policy; none was asked for"):
        client.score([group([1])])


# --------------------------------------------------------------------------------------------------------------------- streams


def test_a_stream_does_not_mix_versions(client: Any, service: ReadingService) -> None:
    def groups() -> Iterator[Any]:
        yield group([1])
        yield group([2])

    stream = client.score_stream(groups(), readings=BOTH, window=StreamWindow(groups_per_call=1, calls_in_flight=1))
    assert next(stream).scores.on("policy")["sum"].value == 10
    service.named["policy"] = reading("policy", "2", step=7)
    with pytest.raises(MismatchError, match="'policy' came to mean sha256:2 of step 7 instead of sha256:1 during the stream") as failed:
        list(stream)
    assert (failed.value.reason, failed.value.field) == ("READING_CHANGED", "readings")


def test_a_call_that_is_resumed_does_not_mix_versions(client: Any, service: ReadingService) -> None:
    def one_then_lost(request: Any) -> Iterator[Any]:
        yield next(answer_in_pieces(request))
        service.named["policy"] = reading("policy", "2")
        raise unavailable()

    service.script = [one_then_lost]
    with pytest.raises(MismatchError, match="sha256:2 instead of sha256:1"):
        list(client.score_stream([group([1], [2], [3])], readings=BOTH))


def test_frozen_alone_does_not_care_about_versions(client: Any, service: ReadingService) -> None:
    stream = client.score_stream([group([1]), group([2])], window=StreamWindow(groups_per_call=1, calls_in_flight=1))
    next(stream)
    service.named["policy"] = reading("policy", "2")
    assert len(list(stream)) == 1


# --------------------------------------------------------------------------------------------------------------------- loading


def test_loading_names_what_was_replaced(client: Any, service: ReadingService) -> None:
    loaded = client.load_reading("policy", "/step-2", step=100, expected_id="sha256:2", in_place=True)

    assert loaded.reading == reading("policy", "2", step=100)
    assert loaded.replaced == reading("policy")
    assert (loaded.golden_drift, loaded.device_bytes) == ({"sum@1": 0.5}, 100)
    sent = service.asked(admin_pb2.LoadReadingRequest)[0]
    assert (sent.name, sent.path, sent.step, sent.expected_id, sent.in_place) == ("policy", "/step-2", 100, "sha256:2", True)
    assert len(service.requests) == 1
    assert client.score([group([1])], readings="policy").info.readings[0].step == 100


def test_a_path_may_be_a_path(client: Any, tmp_path: Any, service: ReadingService) -> None:
    service.directories[str(tmp_path)] = "3"
    assert client.load_reading("policy", tmp_path).reading.id == "sha256:3"
    assert not service.requests[0].HasField("step")


def test_readings_are_listed_and_unloaded(client: Any, service: ReadingService) -> None:
    assert client.readings() == (reading("frozen"), reading("policy"))
    assert client.unload_reading("policy") == reading("policy")
    assert client.readings() == (reading("frozen"),)
    with pytest.raises(InvalidRequestError, match="UNKNOWN_READING"):
        client.unload_reading("policy")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"name": "frozen"}, "name"),
        ({"name": "a/b"}, "name"),
        ({"path": ""}, "path"),
        ({"path": 3}, "path"),
        ({"step": -1}, "step"),
        ({"step": 1.5}, "step"),
        ({"expected_id": 3}, "expected_id"),
    ],
)
def test_what_cannot_be_loaded_is_refused_at_once(client: Any, service: Service, arguments: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as failed:
        client.load_reading(**{"name": "policy", "path": "/step-1", **arguments})
    assert failed.value.field == field
    with pytest.raises(InvalidRequestError):
        client.unload_reading("frozen")
    assert service.requests == []


def test_files_that_are_being_written_are_waited_for(client_class: Any, address: str, service: ReadingService) -> None:
    incomplete = Refusal(
        grpc.StatusCode.UNAVAILABLE, "model.safetensors is shorter than it says", (error_info("READING_INCOMPLETE"), retry_info(0.02))
    )
    # the time that the client waits for a server is not that which it waits for files
    with client_class(address, timeout=20, restart_budget=0.01) as client:
        service.script = [incomplete] * 5
        assert client.load_reading("policy", "/step-2").reading.id == "sha256:2"
        assert len(service.requests) == 6
        service.script = [incomplete] * 1000
        with pytest.raises(UnavailableError, match=r"shorter than it says.*timeout") as failed:
            client.load_reading("policy", "/step-2", timeout=0.2)
    assert failed.value.reason == "READING_INCOMPLETE"


@pytest.mark.parametrize(
    ("reason", "code", "kind"),
    [
        ("READING_REFUSED", grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        ("READING_MISMATCH", grpc.StatusCode.FAILED_PRECONDITION, MismatchError),
        ("READINGS_OFF", grpc.StatusCode.FAILED_PRECONDITION, ServerError),
        ("ASLEEP", grpc.StatusCode.FAILED_PRECONDITION, ServerError),
    ],
)
def test_refusals_are_told_apart(client: Any, service: ReadingService, reason: str, code: Any, kind: type[Exception]) -> None:
    service.script = [refused(reason, code)]
    with pytest.raises(kind) as failed:
        client.load_reading("policy", "/step-2")
    assert (type(failed.value), failed.value.reason) == (kind, reason)


@pytest.mark.parametrize(
    "method", [lambda client: client.load_reading("policy", "/step-1"), lambda client: client.unload_reading("policy")]
)
def test_a_server_that_takes_none_names_the_settings(client_class: Any, method: Any) -> None:
    without = serving(Service(admin=False))
    with without as address, client_class(address) as client, pytest.raises(ServerError, match="setting admin or readings_root") as off:
        method(client)
    assert (off.value.code, off.value.reason) == ("UNIMPLEMENTED", "READINGS_OFF")


def test_an_answer_about_another_reading_is_refused(client: Any, service: ReadingService) -> None:
    other = admin_pb2.LoadReadingResponse(reading=scoring_pb2.Reading(name="other", id="sha256:2", kind=scoring_pb2.READING_KIND_ADAPTER))
    service.script = [lambda _: other]
    with pytest.raises(ServerError, match=r"reading\.name: is 'other'; 'policy' was loaded"):
        client.load_reading("policy", "/step-2")


# ------------------------------------------------------------------------------------------------------------- several servers


def server(*directories: str, loaded: str | None = "1") -> ReadingService:
    named = {} if loaded is None else {"policy": reading("policy", loaded)}
    return ReadingService(directories={path: path.rpartition("-")[2] for path in directories}, named=named)


def test_a_reading_is_loaded_on_every_server(client_class: Any) -> None:
    first, second = server("/step-2"), server("/step-2", loaded=None)
    with several(client_class, first, second) as (client, _):
        loaded = client.load_reading("policy", "/step-2", step=9)
        assert (loaded.reading.id, loaded.replaced) == ("sha256:2", reading("policy"))
        assert loaded_from(first, second) == ["sha256:2"] * 2
        for _ in range(4):
            assert client.score([group([1])], readings="policy").info.readings[0].id == "sha256:2"
        assert client.readings() == (reading("frozen"), reading("policy", "2", 9))
        assert client.unload_reading("policy").id == "sha256:2"
        assert loaded_from(first, second) == [None, None]


def test_every_address_of_a_name_is_loaded(client_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = server("/step-2"), server("/step-2")
    with serving(first, "127.0.0.1:0") as one:
        port = int(one.rpartition(":")[2])
        with serving(second, f"127.0.0.2:{port}"):
            found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.1", "127.0.0.2")]
            found.append((socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0)))
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
            with client_class(f"dns:///policies.internal:{port}", timeout=20) as client:
                client.load_reading("policy", "/step-2")
    assert loaded_from(first, second) == ["sha256:2"] * 2


def test_what_one_server_refuses_is_undone_on_all(client_class: Any) -> None:
    first, second = server("/step-2"), server()
    with several(client_class, first, second) as (client, addresses), pytest.raises(InvalidRequestError) as failed:
        client.load_reading("policy", "/step-2")
    # who has not loaded it cannot load it again
    assert loaded_from(first, second) == [None, "sha256:1"]
    assert failed.value.reason == "READING_REFUSED"
    assert f"{addresses[1]}: refused: READING_REFUSED" in str(failed.value)
    assert f"on {addresses[0]} nothing, since the files of sha256:1… could not be loaded again" in str(failed.value)
    assert f"on {addresses[1]} what it meant before, sha256:1…" in str(failed.value)


@pytest.mark.parametrize("in_place", [False, True])
def test_what_this_client_has_loaded_is_loaded_again(client_class: Any, in_place: bool) -> None:
    first, second = server("/step-1", "/step-2", loaded=None), server("/step-1", loaded=None)
    with several(client_class, first, second) as (client, addresses):
        client.load_reading("policy", "/step-1", step=5)
        with pytest.raises(
            InvalidRequestError, match=f"on {addresses[0]} what it meant before, sha256:1… of step 5; on {addresses[1]} what"
        ):
            client.load_reading("policy", "/step-2", step=6, in_place=in_place)
        assert first.named == second.named == {"policy": reading("policy", "1", 5)}
        assert client.score([group([1])], readings="policy").info.readings[0].step == 5


@pytest.mark.parametrize("in_place", [False, True])
def test_what_calls_hold_on_one_server_is_left_as_it_was(client_class: Any, in_place: bool) -> None:
    first, second = server("/step-1", "/step-2", loaded=None), server("/step-1", "/step-2", loaded=None)
    with several(client_class, first, second) as (client, addresses):
        client.load_reading("policy", "/step-1", step=5)
        second.held.add("policy")
        with pytest.raises(ServerError, match=f"on {addresses[1]} what it meant before, sha256:1… of step 5") as failed:
            client.load_reading("policy", "/step-2", in_place=in_place)
    assert failed.value.reason == "READING_IN_USE"
    assert first.named == second.named == {"policy": reading("policy", "1", 5)}
    assert len(second.asked(admin_pb2.LoadReadingRequest)) == 2


def test_what_has_been_overwritten_is_unloaded(client_class: Any) -> None:
    first, second = server("/step-1", loaded=None), server("/step-1", loaded=None)
    with several(client_class, first, second) as (client, _):
        client.load_reading("policy", "/step-1")
        first.directories["/step-1"] = "2"
        del second.directories["/step-1"]
        with pytest.raises(InvalidRequestError, match="nothing, since the files of sha256:1… could not be loaded again"):
            client.load_reading("policy", "/step-1")
    assert loaded_from(first, second) == [None, "sha256:1"]


def test_servers_that_have_read_different_files_take_none(client_class: Any) -> None:
    first, second = server("/step-2", loaded=None), server("/step-2", loaded=None)
    second.directories["/step-2"] = "other"
    with several(client_class, first, second) as (client, addresses), pytest.raises(MismatchError, match="different files") as failed:
        client.load_reading("policy", "/step-2")
    assert failed.value.reason == "READING_DIFFERS"
    assert all(f"{address}: sha256:" in str(failed.value) for address in addresses)
    assert loaded_from(first, second) == [None, None]


def test_nothing_is_loaded_where_a_server_is_away(client_class: Any) -> None:
    first, second = server("/step-2"), server("/step-2")
    with serving(first) as one:
        with serving(second) as two:
            pass
        with client_class([one, two], timeout=20, restart_budget=0) as client, pytest.raises(UnavailableError):
            client.load_reading("policy", "/step-2")
    assert loaded_from(first) == ["sha256:1"]
    assert first.asked(admin_pb2.LoadReadingRequest) == []


def test_a_load_whose_answer_was_lost_is_undone_too(client_class: Any) -> None:
    first, second = server("/step-2", loaded=None), server("/step-2", loaded=None)

    class LosesAnswers(ReadingService):
        def LoadReading(self, request: Any, context: Any) -> Any:
            super().LoadReading(request, context)
            Refusal(grpc.StatusCode.UNAVAILABLE, "connection lost").abort(context)

    second = LosesAnswers(directories=second.directories)
    with several(client_class, first, second, restart_budget=0) as (client, addresses):
        nothing = "; ".join(f"on {address} nothing" for address in addresses)
        with pytest.raises(UnavailableError, match=f"connection lost; .* so now it means {nothing}$"):
            client.load_reading("policy", "/step-2")
    assert loaded_from(first, second) == [None, None]


def test_a_name_that_some_servers_lack_is_unloaded_on_the_others(client_class: Any) -> None:
    first, second = server(), server(loaded=None)
    with several(client_class, first, second) as (client, _):
        assert client.unload_reading("policy").id == "sha256:1"
        assert loaded_from(first, second) == [None, None]
        with pytest.raises(InvalidRequestError, match="UNKNOWN_READING"):
            client.unload_reading("policy")


def test_a_server_that_does_not_unload_is_named(client_class: Any) -> None:
    first, second = server(), server()
    second.script = [refused("PERMISSION", grpc.StatusCode.PERMISSION_DENIED)]
    with several(client_class, first, second) as (client, addresses):
        told = f"{addresses[1]}: refused.*unloaded on: {addresses[0]}; unload it again"
        with pytest.raises(AuthenticationError, match=told):
            client.unload_reading("policy")


def test_scores_of_servers_with_different_versions_are_not_mixed(client_class: Any) -> None:
    first, second = server(loaded="1"), server(loaded="2")
    with several(client_class, first, second, restart_budget=0.3) as (client, addresses):
        with pytest.raises(UnavailableError, match="do not have the same version of reading 'policy'") as failed:
            client.score([group([1])], readings=BOTH)
        assert failed.value.reason == "READING_DIFFERS"
        assert all(address in str(failed.value) for address in addresses)
        with pytest.raises(MismatchError, match="do not have the same version"):
            client.readings()
        groups = [group([number]) for number in range(1, 9)]
        stream = client.score_stream(groups, readings=BOTH, window=StreamWindow(groups_per_call=1, calls_in_flight=1))
        with pytest.raises(MismatchError, match="would be mixed"):
            list(stream)
        # frozen's scores are the same everywhere
        assert client.score([group([1])]).values("sum").tolist() == [1]


def test_a_server_that_has_lost_a_reading_is_noticed(client_class: Any) -> None:
    first, second = server(), server(loaded=None)
    with several(client_class, first, second, restart_budget=0.2) as (client, _):
        for _ in range(3):
            with pytest.raises((UnavailableError, ServerError)):
                client.score([group([1])], readings=BOTH)


def test_a_version_that_is_being_replaced_is_waited_for(client_class: Any) -> None:
    first, second = server(loaded="1"), server(loaded="1")
    with several(client_class, first, second) as (client, _):
        for _ in range(4):
            client.score([group([1])], readings="policy")
        assert len(first.asked(scoring_pb2.GetServerInfoRequest)) == 1  # a version that all are known to have costs nothing more

        # when another client replaces it, on one server a moment before the other
        first.named["policy"] = reading("policy", "2")
        later = threading.Timer(0.3, lambda: second.named.update(policy=reading("policy", "2")))
        later.start()
        ids = [client.score([group([1])], readings="policy").info.readings[0].id for _ in range(6)]
        later.join()

    # then the old version does not come back after the new one
    assert ids == sorted(ids)
    assert ids[-1] == "sha256:2"


def test_a_server_that_is_away_has_no_say(client_class: Any) -> None:
    first, second = server(), server()
    with serving(first) as one:
        with serving(second) as two:
            pass
        with client_class([one, two], timeout=20) as client:
            assert client.score([group([1])], readings="policy").info.readings[0].id == "sha256:1"


def test_a_client_forgets_nothing_it_needs_when_pickled(client_class: Any, address: str) -> None:
    with client_class(address) as client:
        client.load_reading("policy", "/step-2")
        inner = getattr(client, "client", client)
        assert pickle.loads(pickle.dumps(inner))._loaded == {}


def test_a_token_counts_once_for_each_reading(client: Any, service: ReadingService) -> None:
    groups = [group([number] * 8, prompt=[1, 2]) for number in range(4)]
    window = StreamWindow(tokens_per_call=40, calls_in_flight=1)

    assert len(list(client.score_stream(groups, window=window))) == 4
    assert len(service.requests) == 1
    assert len(list(client.score_stream(groups, readings=BOTH, window=window))) == 4
    assert [len(request.groups) for request in service.requests[1:]] == [2, 2]
