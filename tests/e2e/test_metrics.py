"""The metrics that a scrape shows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
import psutil
import pytest
from calls import TIMEOUT, connected, eventually, group, request, scrape, total
from running_server import RunningServer

from probescore.v1 import probes_pb2, scoring_pb2


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


def test_it_adds_up_at_any_moment(served: RunningServer) -> None:
    """Scraped while calls come and go."""

    def hammer() -> None:
        with connected(served) as stub:
            for _ in range(40):
                stub.Score(request(), timeout=TIMEOUT)

    with ThreadPoolExecutor(6) as clients:
        calls = [clients.submit(hammer) for _ in range(6)]
        seen = []
        while not all(call.done() for call in calls):
            samples = scrape(served)
            counts = [
                sum(v for name, v in samples.items() if name.startswith(f"grpc_server_{what}_total")) for what in ("started", "handled")
            ]
            seen.append((*counts, samples["probescore_rpcs_in_flight{}"]))
        for call in calls:
            call.result()
    assert [moment for moment in seen if moment[0] != moment[1] + moment[2]] == []
    assert max(in_flight for _, _, in_flight in seen) > 0


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


def test_batches_are_counted_in_rollouts_too(served: RunningServer) -> None:
    before = total(served, "probescore_batch_rollouts_sum")
    score(served, request(group([1, 5, 6, 7], [8, 9], [8, 11])))
    assert total(served, "probescore_batch_rollouts_sum") == before + 2


def test_the_cache_shows_what_it_holds_and_what_it_was_good_for(served: RunningServer) -> None:
    def lookups(result: str) -> float:
        return total(served, "probescore_kv_cache_lookups_total", f'result="{result}"')

    misses, hits = lookups("miss"), lookups("hit")
    score(served, request(group([70, 71, 72], [8, 9])))
    eventually(lambda: lookups("miss") > misses)
    score(served, request(group([70, 71, 72], [10, 11])))
    eventually(lambda: lookups("hit") > hits)
    assert total(served, "probescore_kv_cache_bytes") > 0


def test_a_worker_shows_the_memory_that_it_takes(served: RunningServer) -> None:
    taken = scrape(served)['probescore_device_memory_bytes{device="cpu",worker="0"}']
    assert taken == pytest.approx(psutil.Process(served.worker_pid()).memory_info().rss, rel=0.2)


def test_each_probe_shows_who_it_is_and_what_it_said(served: RunningServer) -> None:
    def calls() -> float:
        return total(served, "probescore_probe_calls_total", 'probe="direction"')

    def scores() -> float:
        return total(served, "probescore_probe_score_count", 'probe="direction"')

    before = calls(), scores()
    score(served, request(group([1, 5, 6, 7], [8, 9], [8, 11])))
    eventually(lambda: (calls(), scores()) == (before[0] + 1, before[1] + 2))  # counted once the answer is on its way
    with connected(served) as stub:
        (probe,) = stub.ListProbes(probes_pb2.ListProbesRequest(), timeout=TIMEOUT).probes
    (info,) = [name for name in scrape(served) if name.startswith("probescore_probe_info{")]
    assert f'graph_sha256="{probe.graph_sha256}"' in info
    assert f'manifest_sha256="{probe.manifest_sha256}"' in info
