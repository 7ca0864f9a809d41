"""Sleep and wake, as a trainer calls them."""

from __future__ import annotations

import pytest
from scripted_server import Service, group, serving, unavailable

from probescore import ServerError, Transfer, UnavailableError
from probescore.v1 import scoring_pb2


def kinds(service: Service) -> list[str]:
    return [type(request).__name__ for request in service.requests]


def test_they_say_what_each_device_moved(client):
    assert client.sleep() == (Transfer("cuda:0", 1.5, 8_000, 9_000),)
    assert client.wake() == (Transfer("cuda:0"),)


def test_a_device_without_room_is_tried_again_as_long_as_the_client_may_wait(client, client_class, address, service):
    service.script = [unavailable(), unavailable()]
    assert client.wake() == (Transfer("cuda:0"),)
    assert kinds(service) == ["WakeRequest"] * 3

    service.script = [unavailable()]
    with client_class(address, timeout=20, restart_budget=0) as impatient, pytest.raises(UnavailableError):
        impatient.wake()


@pytest.mark.parametrize("method", ["sleep", "wake"])
def test_a_server_that_does_not_take_them_names_the_setting(client_class, method):
    without = serving(Service(admin=False))
    with without as address, client_class(address) as client, pytest.raises(ServerError, match="setting admin is off") as off:
        getattr(client, method)()
    assert (off.value.code, off.value.reason) == ("UNIMPLEMENTED", "ADMIN_OFF")


def test_any_other_failure_is_as_it_came(client, service):
    service.script = [lambda _: (_ for _ in ()).throw(RuntimeError("broken"))]
    with pytest.raises(ServerError) as failed:
        client.sleep()
    assert failed.value.code == "UNKNOWN"


@pytest.mark.parametrize("method", ["sleep", "wake"])
def test_several_servers_need_a_client_each(client_class, method):
    with client_class(["127.0.0.1:1", "127.0.0.1:2"]) as client, pytest.raises(ValueError, match="make a client for each"):
        getattr(client, method)()


def test_awake_is_for_a_block_only(client, service):
    with client.awake():
        client.score([group([3])])
    assert kinds(service) == ["WakeRequest", "ScoreRequest", "SleepRequest"]


def test_a_block_that_fails_ends_asleep_too(client, service):
    with pytest.raises(ZeroDivisionError), client.awake(timeout=5):
        raise ZeroDivisionError
    assert kinds(service) == ["WakeRequest", "SleepRequest"]


def test_they_are_sent_with_the_clients_metadata(client_class, address, service):
    with client_class(address, metadata={"authorization": "Bearer right"}) as client:
        client.sleep()
    assert service.metadata[-1]["authorization"] == "Bearer right"


def test_a_worker_of_an_older_server_is_awake():
    from probescore.wire import server_info_from_proto

    answer = scoring_pb2.GetServerInfoResponse(workers=[scoring_pb2.WorkerInfo(device="cpu", ready=True)])
    assert server_info_from_proto(answer).workers[0].asleep is False
