"""``probescore gateway``, as a process, against a real server: what trainers send, what people send, and what nobody should."""

from __future__ import annotations

import asyncio
import json
import math
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from malformed_bodies import BODIES, malformed
from models import BOS, EOS, tiny_tokenizer
from running_gateway import RunningGateway, start_gateway
from running_server import RunningServer, start_server

from probescore import Chat
from probescore_adapters import GuardRails, ProbeScorer, ProbeSignal, Rollout
from probescore_adapters.http.bodies import BodyLimitMiddleware
from probescore_adapters.http.problems import DESCRIPTIONS
from probescore_server.cli.gateway import HeadTimeoutProtocol

SIGNALS = json.dumps([{"probe": "cheating", "mode": "reward"}])
WORST = -1e6
RAILS = json.dumps({"clip": -WORST})
# as slime's and OpenRLHF's own code wrote them to a socket that recorded
SLIME = b'{"prompt": "w5 w6", "response": " w7 w8 </s>", "label": "w7"}'
SLIME_CHAT = b'{"prompt": [{"role": "user", "content": "w5 w6"}], "response": " w7 w8 </s>", "label": "w7"}'
OPENRLHF = b'{"query": ["w5 w6 w7 w8 </s>"], "prompts": ["w5 w6"], "labels": ["w7"]}'
PROMPT, COMPLETION = [5, 6], [7, 8, EOS]
PROBLEM = "application/problem+json"
ANSWER_SECONDS = 5.0


@pytest.fixture(scope="module")
def gateway(served: RunningServer) -> Iterator[RunningGateway]:
    with start_gateway("--address", served.address, "--signals", SIGNALS, "--rails", RAILS) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def scorer(served: RunningServer) -> ProbeScorer:
    """The same signals without a gateway, which is compared with plain Hugging Face elsewhere."""
    return ProbeScorer(ProbeSignal("cheating", mode="reward"), served.address, rails=GuardRails(clip=-WORST))


def value(scorer: ProbeScorer, *rollouts: Rollout) -> Any:
    return pytest.approx(scorer.score(rollouts).rewards.tolist(), rel=1e-5)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


# ------------------------------------------------------------------------------------------------------------------ what trainers send


def test_words_of_these_tests_are_these_ids() -> None:
    assert tiny_tokenizer()("w5 w6", add_special_tokens=False)["input_ids"] == PROMPT
    assert tiny_tokenizer()(" w7 w8 </s>", add_special_tokens=False)["input_ids"] == COMPLETION


def test_slime_gets_the_number_of_its_ids(gateway: RunningGateway, scorer: ProbeScorer) -> None:
    answer = gateway.post("/slime", SLIME)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert [json.loads(answer.body)] == value(scorer, Rollout(PROMPT, COMPLETION))


def test_slime_may_send_a_chat(gateway: RunningGateway, scorer: ProbeScorer) -> None:
    answer = gateway.post("/slime", SLIME_CHAT)
    assert [json.loads(answer.body)] == value(scorer, Rollout(Chat.of([{"role": "user", "content": "w5 w6"}]), COMPLETION))


def test_openrlhf_gets_the_number_of_its_ids_and_logs(gateway: RunningGateway, scorer: ProbeScorer) -> None:
    answer = gateway.post("/openrlhf", OPENRLHF)
    body = json.loads(answer.body)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert body["rewards"] == body["scores"] == body["extra_logs"]["probescore/cheating/mean"] == value(scorer, Rollout(PROMPT, COMPLETION))


def test_openrlhf_always_gets_the_same_logs_and_numbers(gateway: RunningGateway) -> None:
    """Given a sample that is scored, and one that nobody can score, then OpenRLHF can make tensors of both and join them."""
    scored = json.loads(gateway.post("/openrlhf", OPENRLHF).body)["extra_logs"]
    unscorable = json.loads(gateway.post("/openrlhf", b'{"query": ["w5 w6"], "prompts": ["w5 w6"], "labels": [null]}').body)["extra_logs"]
    assert list(scored) == list(unscorable)
    assert all(isinstance(number, float) for logs in (scored, unscorable) for numbers in logs.values() for number in numbers)
    assert (scored["probescore/unscorable"], unscorable["probescore/unscorable"]) == ([0.0], [1.0])


def test_query_that_does_not_begin_with_its_prompt_is_unscorable(gateway: RunningGateway) -> None:
    answer = gateway.post("/openrlhf", b'{"query": ["w5 w7 w8"], "prompts": ["w5 w6"], "labels": ["w7"]}')
    assert json.loads(answer.body)["rewards"] == [WORST]


# ------------------------------------------------------------------------------------------------------------------- what people send


def test_ids_text_and_chats_are_scored_together(gateway: RunningGateway, scorer: ProbeScorer) -> None:
    rollouts = [
        {"prompt": [BOS, *PROMPT], "completion": COMPLETION, "mask": [1, 0, 1]},
        {"prompt": "w5 w6", "completion": COMPLETION},
        {"prompt": [{"role": "user", "content": "w5"}], "completion": "w7 w8"},
        {"prompt": PROMPT, "completion": [7, 10**6]},
    ]
    answer = gateway.post("/v1/score", json.dumps({"rollouts": rollouts, "step": 3}).encode())
    body = json.loads(answer.body)
    expected = value(
        scorer,
        Rollout([BOS, *PROMPT], COMPLETION, [1, 0, 1]),
        Rollout(PROMPT, COMPLETION),
        Rollout(Chat.of([{"role": "user", "content": "w5"}]), [7, 8]),
    )
    assert answer.status == 200
    assert body["rewards"][:3] == body["values"]["cheating"][:3] == expected
    assert (body["rewards"][3], body["values"]["cheating"][3]) == (WORST, None)
    assert body["unscorable"] == [False, False, False, True]
    assert body["metrics"]["probescore/inexact_ids"] == 0.5


def test_page_describes_every_route_with_every_status(gateway: RunningGateway) -> None:
    paths = json.loads(gateway.get("/openapi.json").body)["paths"]
    for route in BODIES:
        assert set(paths[route]["post"]["responses"]) == {"200", *map(str, DESCRIPTIONS)}
    assert gateway.get("/docs").status == 200


def test_page_loads_nothing_from_elsewhere(gateway: RunningGateway) -> None:
    """Then no address of anybody else's is on it, and a browser is told to load nothing."""
    page = gateway.get("/docs")
    text = page.body.decode()
    assert not re.search(r"(?i)(src|href|url|import|action)\s*[=(]\s*[\"']?\s*(https?:)?//", text)
    assert "<script" not in text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert gateway.get("/redoc").status == 404
    for route in BODIES:
        assert f"<code>{route}</code>" in text


def test_gateway_says_that_it_is_there(gateway: RunningGateway) -> None:
    assert json.loads(gateway.get("/healthz").body) == {"status": "ok"}


# ------------------------------------------------------------------------------------------------------------ what nobody should send


def test_a_thousand_malformed_bodies_have_a_documented_answer_each(gateway: RunningGateway, scorer: ProbeScorer) -> None:
    """Then it is a problem, or exactly the number that the same text has without a gateway; and the log has no traceback."""
    answered: dict[int, int] = {}
    for route, body in malformed(seed=4, count=1000):
        started = time.monotonic()
        answer = gateway.post(route, body)
        assert time.monotonic() - started < ANSWER_SECONDS, (route, body[:200])
        answered[answer.status] = answered.get(answer.status, 0) + 1
        if answer.status == 200:
            assert rewards_in(route, answer.body) == value(scorer, *rollouts_of(route, json.loads(body))), (route, body[:200])
        else:
            assert_problem(answer.status, answer.headers, answer.body, {400, 413, 422})
    assert set(answered) == {200, 400, 422}
    assert min(answered.values()) >= 20
    assert "Traceback" not in gateway.log.read_text()


def rewards_in(route: str, body: bytes) -> list[float]:
    answer = json.loads(body)
    return [answer] if route == "/slime" else answer["rewards"]


def rollouts_of(route: str, body: Any) -> list[Rollout]:
    """Of a body that is fine, by what its sender means."""
    if route == "/v1/score":
        return [Rollout(prompt_of(one["prompt"]), one["completion"], one.get("mask")) for one in body["rollouts"]]
    if route == "/slime":
        return [Rollout(prompt_of(body["prompt"]), body["response"])]
    empty = Rollout(PROMPT, [])
    pairs = zip(body["prompts"], body["query"], strict=True)
    return [Rollout(prompt, query[len(prompt) :]) if query.startswith(prompt) else empty for prompt, query in pairs]


def prompt_of(prompt: Any) -> Any:
    return Chat.of(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict) else prompt


def assert_problem(status: int, headers: dict[str, str], body: bytes, statuses: set[int]) -> None:
    problem = json.loads(body)
    assert status in statuses
    assert headers["content-type"] == PROBLEM
    assert set(problem) == {"title", "status", "detail", "errors"}
    assert problem["status"] == status
    assert not any(inside in body for inside in (b"Traceback", b".py", b"/work", b"site-packages", b"object at 0x"))


NOT_JSON = {"cut": SLIME[:20], "not UTF-8": b'"\xff"', "too deep": b"[" * 100_000, "long number": b'{"prompt": ' + b"9" * 10_000 + b"}"}
NOT_A_BODY = {
    "empty": b"",
    "null": b"null",
    "a list": b"[" + SLIME + b"]",
    "a number": b'{"prompt": 5, "response": "w5"}',
    "not a number": b'{"prompt": "w5", "response": NaN}',
    "a missing key": b'{"prompt": "w5"}',
    "an empty chat": b'{"prompt": [], "response": "w5"}',
    "a picture in a chat": b'{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "response": "w5"}',
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_what_is_not_json_is_said_to_be_so(gateway: RunningGateway, body: bytes) -> None:
    answer = gateway.post("/slime", body)
    assert_problem(answer.status, answer.headers, answer.body, {400})


@pytest.mark.parametrize("body", NOT_A_BODY.values(), ids=NOT_A_BODY.keys())
def test_what_is_not_a_body_of_this_route_is_said_to_be_so(gateway: RunningGateway, body: bytes) -> None:
    answer = gateway.post("/slime", body)
    assert_problem(answer.status, answer.headers, answer.body, {422})
    assert json.loads(answer.body)["errors"]


MANY_FAULTS = {
    "/openrlhf": b'{"query": [5' + b",5" * 5_000_000 + b'], "prompts": ["w5"], "labels": [null]}',
    "/slime": b'{"prompt": [5' + b",5" * 5_000_000 + b'], "response": "w5"}',
    "/v1/score": b'{"rollouts": [{"prompt": [5], "completion": [-5' + b",-5" * 3_000_000 + b"]}]}",
    "/v1/score?": json.dumps({f"{key:x}": 0 for key in range(1_200_000)}).encode(),
}


@pytest.mark.parametrize(("route", "body"), MANY_FAULTS.items(), ids=MANY_FAULTS.keys())
def test_millions_of_faults_are_answered_as_quickly_as_one(gateway: RunningGateway, route: str, body: bytes) -> None:
    started = time.monotonic()
    answer = gateway.post(route, body)
    assert_problem(answer.status, answer.headers, answer.body, {422})
    assert time.monotonic() - started < ANSWER_SECONDS


def test_mask_of_another_length_is_named(gateway: RunningGateway) -> None:
    answer = gateway.post("/v1/score", b'{"rollouts": [{"prompt": [5], "completion": [6, 7], "mask": [1]}]}')
    assert answer.status == 422
    assert json.loads(answer.body)["errors"] == [{"field": "rollouts.0", "problem": "mask has 1 entries for 2 tokens"}]


def test_large_body_is_refused_and_the_next_one_answered(served: RunningServer) -> None:
    with start_gateway("--address", served.address, "--signals", SIGNALS, "--max-body-bytes", "1000") as gateway:
        answer = gateway.post("/slime", b"x" * 5_000_000)
        assert_problem(answer.status, answer.headers, answer.body, {413})
        assert gateway.post("/slime", SLIME).status == 200


async def test_slow_body_is_given_up() -> None:
    """Given a client that says half a body and then nothing."""
    sent: list[dict[str, Any]] = []
    said = iter([{"type": "http.request", "body": b"{", "more_body": True}])

    async def receive() -> dict[str, Any]:
        return next(said, None) or await asyncio.Event().wait()  # type: ignore[return-value]

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def app(*_: object) -> None:
        raise AssertionError("there was no body")

    await BodyLimitMiddleware(app, max_bytes=100, seconds=0.05)({"type": "http"}, receive, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 408


SLOW_HEADS = {
    "body": b"POST /slime HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n",
    "chunks": b"POST /slime HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
    "head": b"POST /slime HTTP/1.1\r\n",
    "nothing": b"",
}
PIECES = {"body": b"a", "chunks": b"1\r\na\r\n", "head": b"A: b\r\n", "nothing": b""}


@pytest.mark.parametrize("slow", SLOW_HEADS)
def test_connection_of_a_slow_client_ends_when_it_was_said_to(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a client that goes on to send, a piece at a time, then its connection ends; the limits are shortened here."""
    monkeypatch.setattr("probescore_server.cli.gateway.HEAD_SECONDS", 0.5)

    async def app(*_: object) -> None:
        raise AssertionError("there was no request")

    config = uvicorn.Config(BodyLimitMiddleware(app, 10_000, 0.5), port=0, http=HeadTimeoutProtocol, loop="asyncio", lifespan="off")  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        (listening,) = server.servers[0].sockets
        with socket.create_connection(listening.getsockname()) as connection:
            connection.settimeout(0.1)
            connection.sendall(SLOW_HEADS[slow])
            ended, pieces, answer = False, 0, b""
            while not ended and pieces < 300:
                pieces += 1
                try:
                    connection.sendall(PIECES[slow])
                    answer += (received := connection.recv(1000))
                    ended = not received
                except TimeoutError:
                    continue
                except OSError:
                    ended = True
    finally:
        server.should_exit = True
        thread.join()
    assert ended
    assert answer.startswith(b"HTTP/1.1 408 ") == (slow in ("body", "chunks"))


@pytest.mark.parametrize(("method", "route", "status"), [("POST", "/score", 404), ("GET", "/slime", 405)])
def test_wrong_routes_and_methods_are_problems_too(gateway: RunningGateway, method: str, route: str, status: int) -> None:
    answer = gateway.request(method, route, b"{}")
    assert_problem(answer.status, answer.headers, answer.body, {status})


# ------------------------------------------------------------------------------------------------------------- when something fails


def without_server(*flags: str) -> RunningGateway:
    return start_gateway("--address", f"127.0.0.1:{free_port()}", "--signals", SIGNALS, "--timeout", "1", *flags)


@pytest.mark.parametrize(("route", "body"), BODIES.items())
def test_without_a_server_there_is_no_number(route: str, body: dict[str, Any]) -> None:
    with without_server() as gateway:
        answer = gateway.post(route, json.dumps(body).encode())
    assert_problem(answer.status, answer.headers, answer.body, {503})
    assert int(answer.headers["retry-after"]) >= 1


def test_without_a_server_the_number_that_was_named_is_answered_and_counted() -> None:
    with without_server("--on-failure", "-3.5") as gateway:
        found = [rewards_in(route, gateway.post(route, json.dumps(body).encode()).body) for route, body in BODIES.items()]
        logs = json.loads(gateway.post("/openrlhf", OPENRLHF).body)["extra_logs"]
        metrics = gateway.get("/metrics").body.decode()
    assert found == [[-3.5]] * 3
    assert logs["probescore/failures"] == [1.0]
    assert math.isnan(logs["probescore/cheating/mean"][0])
    assert 'probescore_gateway_rollouts_total{outcome="substituted"} 4.0' in metrics
    assert 'probescore_gateway_requests_total{route="/openrlhf",status="200"} 2.0' in metrics


def test_gateway_may_start_before_its_server(model: Path, probe_files: list[Path]) -> None:
    port = free_port()
    with start_gateway("--address", f"127.0.0.1:{port}", "--signals", SIGNALS) as gateway:
        assert "no server answers yet" in gateway.log.read_text()
        with start_server(model, probe_files, port=port):
            assert gateway.post("/slime", SLIME).status == 200


def test_unscorable_may_be_an_error(served: RunningServer) -> None:
    with start_gateway("--address", served.address, "--signals", SIGNALS, "--on-unscorable", "raise") as gateway:
        answer = gateway.post("/slime", b'{"prompt": "w5", "response": "", "label": null}')
    assert_problem(answer.status, answer.headers, answer.body, {422})


def test_signals_that_do_not_go_with_the_server_are_an_error_whatever_the_policy(model: Path, probe_files: list[Path]) -> None:
    """Given a gateway that could not check them, since the server was not there when it started."""
    port, signals = free_port(), json.dumps({"probe": "honesty", "mode": "monitor"})
    flags = ("--address", f"127.0.0.1:{port}", "--signals", signals, "--on-failure", "0")
    with start_gateway(*flags) as gateway, start_server(model, probe_files, port=port):
        answer = gateway.post("/slime", SLIME)
    assert_problem(answer.status, answer.headers, answer.body, {500})
    assert "honesty" in json.loads(answer.body)["detail"]


WRONG_SETTINGS = {
    "no signals": ((), "PROBESCORE_SIGNALS: required"),
    "a mode that a number cannot be": (("--signals", '[{"probe": "cheating", "mode": "screen"}]'), "screen cannot be done here"),
    "a comparison with rollouts that nobody has": (
        ("--signals", '[{"probe": "cheating", "mode": "relative_gate"}]'),
        "relative_gate cannot be done here",
    ),
    "a report that nobody can find": (("--signals", '[{"probe": "cheating", "mode": "agreement"}]'), "report: the mode agreement needs"),
    "a probe that is not loaded": (("--signals", '[{"probe": "honesty"}]'), "it is not loaded"),
    "a policy": (("--signals", SIGNALS, "--on-failure", "zero"), "PROBESCORE_ON_FAILURE: expected"),
}


@pytest.mark.parametrize(("flags", "said"), WRONG_SETTINGS.values(), ids=WRONG_SETTINGS.keys())
def test_wrong_setting_ends_it_with_one_line(served: RunningServer, flags: tuple[str, ...], said: str) -> None:
    ended = start_gateway("--address", served.address, *flags, wait=False)
    (line,) = [line for line in ended.log.read_text().splitlines() if line.startswith("probescore:")]
    assert said in line
    assert ended.process.returncode == 2


def test_port_that_is_taken_ends_it(gateway: RunningGateway, served: RunningServer) -> None:
    ended = start_gateway("--address", served.address, "--signals", SIGNALS, "--port", str(gateway.port), wait=False)
    assert ended.process.returncode == 3
    assert "Traceback" not in ended.log.read_text()


def test_gateway_answers_what_it_has_taken_before_it_ends(served: RunningServer) -> None:
    gateway = start_gateway("--address", served.address, "--signals", SIGNALS)
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        head = f"POST /slime HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(SLIME)}\r\n\r\n"
        connection.sendall(head.encode() + SLIME[:10])
        time.sleep(0.2)
        gateway.process.terminate()
        time.sleep(0.2)
        connection.sendall(SLIME[10:])
        answered = connection.makefile("rb").read()
    assert answered.startswith(b"HTTP/1.1 200 ")
    assert gateway.process.wait(20) == 0
