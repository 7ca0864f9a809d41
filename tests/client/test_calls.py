"""Calls over a real socket: what is sent, deadlines, retries, restarts, several servers. Each test runs on both clients."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from scripted_server import INFO, Refusal, Service, answer, error_info, group, queue_full, retry_info, serving, unavailable

from probescore import (
    Completion,
    CompletionScores,
    CompletionStatus,
    DeadlineExceededError,
    GroupScores,
    InvalidRequestError,
    OverloadedError,
    ProbeClient,
    Reduction,
    RolloutGroup,
    Scope,
    ScoreResult,
    ServerError,
    TransientError,
    UnavailableError,
)
from probescore._retries import Attempts
from probescore.wire import options_from_request, result_to_proto


def test_scores_come_back_in_the_order_of_the_request(client: Any) -> None:
    result = client.score([group([1, 2], [3]), group([4, 5, 6])])

    assert [[completion["sum"].value for completion in scored] for scored in result.groups] == [[3, 3], [15]]
    assert result.values("sum").tolist() == [3, 3, 15]
    assert result.info.model_fingerprint == "sha256:model"


def test_every_option_reaches_the_server(client: Any, service: Service) -> None:
    client.score(
        [RolloutGroup([1], [Completion([2], id="a")])],
        probes=["sum", "pair@2"],
        reductions=["mean", Reduction.parse("topk_mean(8)")],
        token_scores=["sum"],
        scope="all",
        expected_model_fingerprint="sha256:model",
        expected_tokenizer_fingerprint="sha256:tokenizer",
        return_token_ids=True,
        return_token_texts=True,
        priority=-3,
        run_id="run",
        step=7,
    )

    sent = options_from_request(service.requests[0])
    assert sent.probes == ("sum", "pair@2")
    assert sent.reductions == (Reduction.parse("mean"), Reduction.parse("topk_mean(8)"))
    assert sent.token_scores == ("sum",)
    assert sent.scope is Scope.ALL
    assert (sent.expected_model_fingerprint, sent.expected_tokenizer_fingerprint) == ("sha256:model", "sha256:tokenizer")
    assert (sent.return_token_ids, sent.return_token_texts) == (True, True)
    assert (sent.priority, sent.run_id, sent.step) == (-3, "run", 7)


@pytest.mark.parametrize(("written", "sent"), [(True, "all"), ("all", "all"), (False, ()), ("sum", ("sum",)), (["a", "b"], ("a", "b"))])
def test_token_scores_may_be_asked_for_in_short(client: Any, service: Service, written: Any, sent: Any) -> None:
    client.score([group([1])], token_scores=written)
    assert options_from_request(service.requests[0]).token_scores == sent


def test_one_probe_or_reduction_needs_no_list(client: Any, service: Service) -> None:
    client.score([group([1])], probes="sum", reductions="ema_max(0.5)")

    sent = options_from_request(service.requests[0])
    assert sent.probes == ("sum",)
    assert sent.reductions == (Reduction.parse("ema_max(0.5)"),)


@pytest.mark.parametrize(
    ("options", "field"),
    [({"scope": "everything"}, "scope"), ({"reductions": ["mean", "median"]}, "reductions[1]"), ({"priority": 1.5}, "priority")],
)
def test_an_option_that_means_nothing_is_refused_by_its_field(client: Any, options: Any, field: str) -> None:
    for call in (client.score, lambda groups, **chosen: list(client.score_stream(groups, **chosen))):
        with pytest.raises(InvalidRequestError) as raised:
            call([group([1])], **options)
        assert raised.value.field == field


def test_an_option_that_does_not_exist_is_refused(client: Any) -> None:
    with pytest.raises(TypeError, match="probez"):
        client.score([group([1])], probez=["sum"])


def test_job_and_metadata_go_with_every_call(client_class: Any, address: str, service: Service) -> None:
    with client_class(address, job="run-7", metadata={"authorization": "Bearer x"}) as client:
        client.score([group([1])])
        list(client.score_stream([group([1])]))
        client.get_server_info()
        client.list_probes()

    assert len(service.metadata) == 4
    for sent in service.metadata:
        assert (sent["x-probescore-job"], sent["authorization"]) == ("run-7", "Bearer x")


def test_server_info_and_probes_are_read(client: Any) -> None:
    assert client.get_server_info().server_version == "9"
    assert client.list_probes() == ()


# ------------------------------------------------------------------------------------------------------------------- deadlines


def test_a_call_ends_at_its_deadline(client_class: Any, address: str, service: Service) -> None:
    release = threading.Event()
    service.script = [lambda request: release.wait(20) and answer(request)]
    with client_class(address) as client:
        with pytest.raises(DeadlineExceededError) as raised:
            client.score([group([1])], timeout=0.2)
        release.set()

    assert raised.value.code == "DEADLINE_EXCEEDED"


def test_a_call_without_a_timeout_has_the_clients(client_class: Any, address: str, service: Service) -> None:
    release = threading.Event()
    service.script = [lambda request: release.wait(20) and answer(request)]
    with client_class(address, timeout=0.2) as client:
        with pytest.raises(DeadlineExceededError):
            client.score([group([1])])
        release.set()


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_no_call_is_without_a_deadline(client_class: Any, address: str, timeout: float) -> None:
    with pytest.raises(ValueError, match="every call has a deadline"):
        client_class(address, timeout=timeout)
    with client_class(address) as client, pytest.raises(ValueError, match="every call has a deadline"):
        client.score([group([1])], timeout=timeout)


@pytest.mark.parametrize("budget", [-1, float("inf"), float("nan")])
def test_a_restart_budget_is_a_number_of_seconds(budget: float) -> None:
    with pytest.raises(ValueError, match="restart_budget"):
        ProbeClient("localhost:1", restart_budget=budget)


# --------------------------------------------------------------------------------------------------------------------- retries


def test_a_call_is_tried_again_while_the_worker_restarts(client: Any, service: Service) -> None:
    service.script = [unavailable()] * 7

    assert client.score([group([1, 2])]).values("sum").tolist() == [3]
    assert len(service.requests) == 8


def test_a_call_is_tried_again_when_the_queue_was_full(client: Any, service: Service) -> None:
    service.script = [queue_full()] * 3

    assert client.score([group([1, 2])]).values("sum").tolist() == [3]
    assert len(service.requests) == 4


def test_an_overload_without_a_hint_is_tried_again_too(client: Any, service: Service) -> None:
    service.script = [Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", (error_info("QUEUE_FULL"),))]

    assert client.score([group([1, 2])]).values("sum").tolist() == [3]


def test_a_call_that_a_stopping_server_cancelled_is_tried_again(client: Any, service: Service) -> None:
    service.script = [Refusal(grpc.StatusCode.CANCELLED, "CANCELLED")]

    assert client.score([group([1, 2])]).values("sum").tolist() == [3]


def test_a_call_that_a_proxy_cancelled_at_the_deadline_has_missed_its_deadline(client: Any, service: Service) -> None:
    service.script = [Refusal(grpc.StatusCode.CANCELLED, "")]

    with pytest.raises(DeadlineExceededError) as failed:
        client.score([group([1, 2])], timeout=0.09)  # no time for another attempt
    assert failed.value.code == "DEADLINE_EXCEEDED"


def test_a_call_that_was_cancelled_long_before_its_deadline_has_not_missed_it(client: Any, service: Service) -> None:
    service.script = [Refusal(grpc.StatusCode.CANCELLED, "", (error_info("STOPPING"), retry_info(60)))]

    with pytest.raises(UnavailableError):
        client.score([group([1, 2])], timeout=30)


@pytest.mark.parametrize("refusal", [queue_full(), unavailable()], ids=["queue full", "unavailable"])
def test_without_a_budget_the_first_failure_is_raised(client_class: Any, address: str, service: Service, refusal: Refusal) -> None:
    service.script = [refusal]
    with client_class(address, restart_budget=0) as client, pytest.raises(TransientError):
        client.score([group([1])])
    assert len(service.requests) == 1


def test_a_hint_beyond_the_budget_is_not_waited_for(client_class: Any, address: str, service: Service) -> None:
    service.script = [queue_full(retry_seconds=3600)]
    with client_class(address, timeout=300, restart_budget=120) as client, pytest.raises(OverloadedError):
        client.score([group([1])])


def test_what_no_retry_can_save_is_not_tried_again(client: Any, service: Service) -> None:
    service.script = [Refusal(grpc.StatusCode.INTERNAL, "broken")]
    with pytest.raises(ServerError):
        client.score([group([1])])
    assert len(service.requests) == 1


def test_pauses_follow_the_hint_with_jitter_and_stop_before_the_deadline() -> None:
    attempts = Attempts(timeout=1000, restart_budget=500)

    pauses = [attempts.pause(UnavailableError("", retry_seconds=100)) for _ in range(20)]

    assert all(100 <= pause <= 125 for pause in pauses)
    assert len(set(pauses)) > 1
    with pytest.raises(OverloadedError):
        attempts.pause(OverloadedError("", retry_seconds=501))


def test_pauses_without_a_hint_grow_up_to_a_limit() -> None:
    attempts = Attempts(timeout=1000, restart_budget=500)

    pauses = [attempts.pause(UnavailableError("")) for _ in range(10)]

    assert pauses[0] < 0.13
    assert all(5 <= pause <= 6.25 for pause in pauses[6:])


def test_progress_gives_the_whole_budget_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    attempts = Attempts(timeout=1000, restart_budget=10)
    attempts.pause(UnavailableError(""))

    now = 100.0
    with pytest.raises(UnavailableError):
        attempts.pause(UnavailableError(""))
    attempts.progressed()
    attempts.pause(UnavailableError(""))  # then the budget counts from here
    assert attempts.seconds_left() == 900


def test_a_server_that_restarts_within_the_budget_is_waited_for(client_class: Any, service: Service) -> None:
    # given a client that has spoken to a server, which then is gone
    with serving(service) as address:
        client = client_class(address, timeout=60, restart_budget=50)
        client.__enter__()
        client.score([group([1])])
    # when it comes back while a call waits
    restarted = threading.Event()

    def restart() -> None:
        time.sleep(0.7)
        with serving(service, address):
            restarted.wait(60)

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        # then the call gets its scores
        assert client.score([group([1, 2])]).values("sum").tolist() == [3]
    finally:
        client.__exit__(None, None, None)
        restarted.set()
        thread.join()


def test_a_server_that_stays_away_fails_the_call_when_the_budget_is_spent(client_class: Any, service: Service) -> None:
    with serving(service) as address:
        pass
    with client_class(address, timeout=60, restart_budget=0.5) as client, pytest.raises(UnavailableError):
        client.score([group([1])])


def test_wait_until_ready_outlasts_any_budget(client_class: Any, address: str, service: Service) -> None:
    service.script = [unavailable()] * 7
    with client_class(address, restart_budget=0) as client:
        assert client.wait_until_ready(20).server_version == "9"


def test_wait_until_ready_ends(client_class: Any, service: Service) -> None:
    with serving(service) as address:
        pass
    # which of the two depends on whether the time ends during an attempt or a pause
    with client_class(address) as client, pytest.raises((UnavailableError, DeadlineExceededError)):
        client.wait_until_ready(0.3)


def test_a_deadline_that_passes_after_failures_says_what_they_were() -> None:
    attempts = Attempts(timeout=1000, restart_budget=500)
    attempts.pause(UnavailableError("connection refused"))

    with pytest.raises(DeadlineExceededError, match="deadline exceeded; the attempt before had failed: connection refused"):
        attempts.pause(DeadlineExceededError("deadline exceeded"))


# ------------------------------------------------------------------------------------------------------------------- addresses


def test_calls_take_turns_over_several_servers(client_class: Any) -> None:
    services = [Service(), Service()]
    with serving(services[0]) as first, serving(services[1]) as second, client_class([first, second]) as client:
        while not all(service.requests for service in services):  # until both connections stand
            client.score([group([1])])
        for service in services:
            service.requests.clear()
        for _ in range(10):
            client.score([group([1])])

    assert [len(service.requests) for service in services] == [5, 5]


def test_when_one_of_two_servers_dies_the_other_takes_over(client_class: Any) -> None:
    services = [Service(), Service()]
    with serving(services[0]) as first:
        with serving(services[1]) as second:
            client = client_class([first, second])
            client.__enter__()
            client.score([group([1])])
        try:
            for _ in range(4):
                assert client.score([group([1, 2])]).values("sum").tolist() == [3]
        finally:
            client.__exit__(None, None, None)


def test_a_unix_socket_is_an_address(client_class: Any, service: Service, tmp_path: Path) -> None:
    with serving(service, f"unix:{tmp_path}/socket") as address, client_class(address) as client:
        assert client.score([group([1, 2])]).values("sum").tolist() == [3]


def test_a_name_that_cannot_be_looked_up_counts_as_unavailable(client_class: Any) -> None:
    with client_class(["localhost:1", "no-such-host.invalid:1"], restart_budget=0) as client:
        with pytest.raises(UnavailableError, match=r"no-such-host\.invalid"):
            client.score([group([1])])
        with pytest.raises(UnavailableError, match=r"no-such-host\.invalid"):
            list(client.score_stream([group([1])]))


def test_a_large_answer_is_taken(client: Any, service: Service) -> None:
    def large(request: Any) -> Any:
        answered = answer(request)
        answered.groups[0].completions[0].status_message = "x" * 2**23  # 8 MiB, above gRPC's own default of 4
        return answered

    service.script = [large]

    assert len(client.score([group([1])]).groups[0][0].status_message) == 2**23


def test_a_closed_client_refuses_calls(client_class: Any, address: str) -> None:
    client = client_class(address)
    with client:
        client.score([group([1])])
        inner = getattr(client, "client", client)
    if inner is client:
        with pytest.raises(RuntimeError, match="closed"):
            client.score([group([1])])
    with pytest.raises(RuntimeError, match="closed"):
        inner.score_stream([group([1])])


def test_values_are_absent_where_nothing_could_be_scored(client: Any, service: Service) -> None:
    broken = CompletionScores("", CompletionStatus.NON_FINITE, {}, "the model gave NaN")
    service.script = [lambda _: result_to_proto(ScoreResult((GroupScores((broken,)),), INFO))]

    result = client.score([group([1])])

    assert np.isnan(result.values("sum")).tolist() == [True]
    with pytest.raises(KeyError, match="the model gave NaN"):
        result.groups[0][0]["sum"]
