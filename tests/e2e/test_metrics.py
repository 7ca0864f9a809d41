"""The metrics that a scrape shows."""

from __future__ import annotations

import grpc
import pytest
from calls import TIMEOUT, connected, eventually, group, request, scrape, total
from running_server import RunningServer

from probescore.v1 import scoring_pb2


def score(server: RunningServer, message: scoring_pb2.ScoreRequest) -> None:
    with connected(server) as stub:
        stub.Score(message, timeout=TIMEOUT, metadata=[("x-probescore-job", "a-job")])


def test_what_started_was_handled_or_is_in_flight(served: RunningServer) -> None:
    score(served, request())
    with pytest.raises(grpc.RpcError):
        score(served, request(probes=["nobody"]))
    samples = scrape(served)
    started = sum(value for name, value in samples.items() if name.startswith("grpc_server_started_total"))
    handled = sum(value for name, value in samples.items() if name.startswith("grpc_server_handled_total"))
    assert started == handled + samples["probescore_rpcs_in_flight{}"]
    assert started >= 2


def test_handled_calls_are_counted_by_their_code(served: RunningServer) -> None:
    def refused() -> float:
        return total(served, "grpc_server_handled_total", 'grpc_code="INVALID_ARGUMENT"', 'grpc_method="Score"', 'grpc_type="unary"')

    before, reasons = refused(), total(served, "probescore_refused_total", "UNKNOWN_PROBE")
    with pytest.raises(grpc.RpcError):
        score(served, request(probes=["nobody"]))
    eventually(lambda: refused() == before + 1)  # counted once the answer is on its way
    assert total(served, "probescore_refused_total", "UNKNOWN_PROBE") == reasons + 1


def test_tokens_add_up_to_what_was_asked_for_a_prompt_once_per_completion(served: RunningServer) -> None:
    before = total(served, "probescore_tokens_total")
    score(served, request(group([1, 5, 6, 7], [8, 9], [8, 10])))
    assert total(served, "probescore_tokens_total") == before + 2 * 4 + 4


def test_stages_readiness_and_workers_are_there_and_no_label_is_the_clients(served: RunningServer) -> None:
    score(served, request(run_id="a-run"))
    samples = scrape(served)
    for stage in ("check", "queue", "compute"):
        assert samples[f'probescore_stage_seconds_count{{stage="{stage}"}}'] > 0
    assert samples["probescore_ready{}"] == 1
    assert samples['probescore_worker_ready{device="cpu",worker="0"}'] == 1
    assert samples['probescore_worker_restarts{device="cpu",worker="0"}'] == 0
    assert not [name for name in samples if "a-job" in name or "a-run" in name]
