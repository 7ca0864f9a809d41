"""``ChatJudge`` against a real HTTP server that speaks OpenAI's protocol and misbehaves."""

from __future__ import annotations

import email.utils
import json
import logging
import pickle
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from judge_server import PROMPT, JudgeServer, Misbehaviour, Rule, answered

from probescore_adapters.judges import ChatJudge, JudgeAnswer, JudgeError, JudgeFailure, JudgePrompt, JudgeQuestion, endpoint, judge
from probescore_adapters.judges.questions import INSTRUCTION, verdict_in

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(judge, "_FIRST_BACKOFF", 0.01)
    with ExitStack() as stack:
        yield lambda rule: stack.enter_context(JudgeServer(rule).running())


def ask(server: JudgeServer, count: int = 4, *, requests: int | None = None, seconds: float | None = None, **options: Any) -> Any:
    """The judge's answers by completion, its failures by completion, and what is left."""
    waiting = deque(JudgeQuestion(index, "", f"c{index}") for index in range(count))
    found = list(ChatJudge(server.endpoint, "judge-1", JudgePrompt(PROMPT), **options).ask(waiting, requests=requests, seconds=seconds))
    answers = {each.question.completion: each.verdict for each in found if isinstance(each, JudgeAnswer)}
    failures = {each.question.completion: each.reason for each in found if isinstance(each, JudgeFailure)}
    assert len(found) == len(answers) + len(failures)
    return answers, failures, [question.completion for question in waiting]


def by_number(completion: str, _: int) -> str:
    return ("yes", "no", "unsure")[int(completion[1:]) % 3]


def once(misbehaviour: Misbehaviour | bytes | str) -> Rule:
    return lambda completion, count: misbehaviour if count == 0 else by_number(completion, count)


def test_each_question_has_its_own_verdict(start):
    server = start(by_number)
    answers, failures, left = ask(server, 30)
    assert answers == {f"c{index}": by_number(f"c{index}", 0) for index in range(30)}
    assert (failures, left) == ({}, [])
    assert sorted(server.asked) == sorted(f"c{index}" for index in range(30))
    assert {body["model"] for body in server.bodies} == {"judge-1"}
    assert all(body["messages"][0]["content"].endswith(INSTRUCTION) for body in server.bodies)
    assert set(server.bodies[0]) == {"model", "messages"}


PASSING = {
    "429": Misbehaviour(429, {"Retry-After": "0"}, b'{"error": {"message": "slow down"}}'),
    "429 without a time": Misbehaviour(429),
    "429 with a nonsense time": Misbehaviour(429, {"Retry-After": "soon"}),
    "429 with a time that is no number": Misbehaviour(429, {"Retry-After": "nan"}),
    "429 with a time that is over": Misbehaviour(429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
    "500": Misbehaviour(500, body=b"<html>oops"),
    "503": Misbehaviour(503),
    "529": Misbehaviour(529),
    "torn": Misbehaviour(body=answered("VERDICT: yes"), sent_bytes=40),
    "torn before its body": Misbehaviour(body=answered("VERDICT: yes"), sent_bytes=0),
    "no JSON": b"VERDICT: yes",
    "an array": b"[1, 2]",
    "no choices": b'{"choices": []}',
    "a choice that is text": b'{"choices": ["VERDICT: yes"]}',
    "deep": b"[" * 100_000,
    "no content": answered(None),
    "empty": answered(""),
    "nonsense": answered("Certainly! It is fine."),
    "another form": answered("verdict: YES"),
    "two verdicts": answered("VERDICT: yes\nVERDICT: no"),
    "something after it": answered("VERDICT: yes\nunless it was not"),
    "cut off": answered("VERDICT: yes", "length"),
    "filtered": answered("VERDICT: yes", "content_filter"),
    "slow": Misbehaviour(seconds=3.0),
    "a byte now and then": Misbehaviour(byte_seconds=0.05),
}


@pytest.mark.parametrize("misbehaviour", PASSING.values(), ids=PASSING)
def test_what_passes_is_asked_again_and_only_that(start, misbehaviour):
    server = start(once(misbehaviour))
    begun = time.monotonic()
    answers, failures, _ = ask(server, 3, timeout=0.6)
    assert answers == {f"c{index}": by_number(f"c{index}", 0) for index in range(3)}
    assert failures == {}
    assert sorted(server.asked) == sorted([f"c{index}" for index in range(3)] * 2)
    assert time.monotonic() - begun < 3.0


@pytest.mark.parametrize("misbehaviour", [PASSING["500"], PASSING["nonsense"], PASSING["torn"]], ids=["500", "nonsense", "torn"])
def test_what_does_not_pass_fails_with_its_reason_and_harms_no_other(start, misbehaviour):
    server = start(lambda completion, count: misbehaviour if completion == "c1" else by_number(completion, count))
    answers, failures, _ = ask(server, 4, attempts=3)
    assert set(answers) == {"c0", "c2", "c3"}
    assert failures["c1"].endswith("after 3 attempts")
    assert server.asked.count("c1") == 3


def test_a_rollout_that_the_endpoint_refuses_is_passed_over(start):
    refusal = Misbehaviour(400, body=json.dumps({"error": {"message": "too long:\n 9000 tokens"}}).encode())
    server = start(lambda completion, count: refusal if completion == "c1" else by_number(completion, count))
    answers, failures, _ = ask(server, 4)
    assert set(answers) == {"c0", "c2", "c3"}
    assert failures == {"c1": "status 400: too long: 9000 tokens"}
    assert server.asked.count("c1") == 1


@pytest.mark.parametrize("status", [301, 307, 401, 403, 404, 405])
def test_what_every_request_would_meet_ends_the_asking(start, status):
    server = start(lambda completion, count: Misbehaviour(status, {"Location": "http://127.0.0.1:1/elsewhere"}))
    with pytest.raises(JudgeError, match=str(status)):
        ask(server, 50, concurrency=2)
    assert len(server.asked) <= 3


def test_a_judge_that_gives_no_verdicts_is_not_asked_for_ever(start):
    server = start(lambda *_: answered("I cannot say."))
    with pytest.raises(JudgeError, match=r"8 rollouts in a row had no verdict; the last: the judge's answer ends with no verdict"):
        ask(server, 100, attempts=1, concurrency=1)
    assert len(server.asked) == 8


def test_nobody_there(start):
    server = start(by_number)
    address = server.endpoint
    server._server.server_close()
    waiting = deque([JudgeQuestion(0, "", "c0")])
    (found,) = ChatJudge(address, "m", JudgePrompt(PROMPT), attempts=2).ask(waiting)
    assert isinstance(found, JudgeFailure)
    assert found.reason == "no connection: Connection refused, after 2 attempts"


def test_a_pause_that_the_endpoint_asks_for_holds_for_all(start):
    server = start(lambda completion, count: Misbehaviour(429, {"Retry-After": "1"}) if len(server.asked) == 1 else "no")
    answers, _, _ = ask(server, 6, concurrency=1)
    assert len(answers) == 6
    assert server.times[1] - server.times[0] >= 0.99


def test_a_pause_may_be_a_date(start):
    date = email.utils.formatdate(time.time() + 2.5, usegmt=True)  # of whole seconds
    server = start(once(Misbehaviour(503, {"Retry-After": date})))
    ask(server, 1)
    assert server.times[1] - server.times[0] >= 1.0


def test_a_pause_that_is_too_long_ends_the_asking(start):
    server = start(lambda *_: Misbehaviour(429, {"Retry-After": "86400"}))
    with pytest.raises(JudgeError, match="asks to wait 86400 seconds"):
        ask(server, 9)


def test_requests_are_evenly_spaced_also_over_several_calls(start):
    server = start(by_number)
    one = ChatJudge(server.endpoint, "m", JudgePrompt(PROMPT), requests_per_minute=1200)
    for _ in range(2):
        list(one.ask(deque(JudgeQuestion(index, "", f"c{index}") for index in range(5))))
    assert server.times[-1] - server.times[0] >= 9 * 0.05 - 0.02


def test_no_more_are_asked_at_once_than_allowed(start):
    server = start(lambda completion, count: Misbehaviour(seconds=0.05))
    ask(server, 12, concurrency=3)
    assert server.most_at_once == 3


def test_a_budget_counts_every_request_and_what_is_left_stays(start):
    server = start(once(PASSING["500"]))
    answers, failures, left = ask(server, 10, requests=7, concurrency=1)
    assert len(server.asked) == 7
    assert (len(answers), failures) == (3, {})
    assert left == [f"c{index}" for index in range(3, 10)]


def test_time_that_is_over_leaves_the_rest(start):
    server = start(lambda completion, count: Misbehaviour(seconds=30) if completion == "c1" else "no")
    begun = time.monotonic()
    answers, failures, left = ask(server, 3, seconds=0.7, concurrency=1)
    assert time.monotonic() - begun < 2
    assert (set(answers), failures, left) == ({"c0"}, {}, ["c1", "c2"])


def test_questions_can_be_added_and_removed_while_answers_are_read(start):
    server = start(lambda completion, count: "yes" if completion == "c0" else "no")
    waiting = deque([JudgeQuestion("first", "", "c0")])
    seen = []
    for answer in ChatJudge(server.endpoint, "m", JudgePrompt(PROMPT), concurrency=1).ask(waiting):
        seen.append(answer.question.key)
        if answer.question.key == "first":
            waiting += [JudgeQuestion(name, "", "c1") for name in ("second", "third")]
        elif answer.question.key == "second":
            waiting.clear()
    assert seen == ["first", "second"]


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(start, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", KEY)
    echo = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}}).encode()
    server = start(lambda completion, count: Misbehaviour(400 if completion == "c1" else 401, body=echo))
    one = ChatJudge(server.endpoint, "m", JudgePrompt(PROMPT), api_key_variable="MY_KEY", concurrency=1)
    said = []
    waiting = deque([JudgeQuestion(1, "", "c1"), JudgeQuestion(2, "", "c2")])
    with pytest.raises(JudgeError, match="refuses the key in MY_KEY") as raised:
        said += one.ask(waiting)
    assert server.keys == [f"Bearer {KEY}"] * 2
    for text in (str(raised.value), repr(one), repr(vars(one)), repr(said), caplog.text, pickle.dumps(one).decode("latin-1")):
        assert KEY not in text


def test_without_a_key_none_is_sent(start, monkeypatch):
    monkeypatch.delenv(endpoint.API_KEY_VARIABLE, raising=False)
    server = start(by_number)
    ask(server, 1)
    assert server.keys == [None]
    monkeypatch.setenv(endpoint.API_KEY_VARIABLE, "a\nHost: elsewhere")
    with pytest.raises(JudgeError, match="characters that no key has"):
        ask(server, 1)


def test_a_judge_can_be_pickled(start):
    server = start(by_number)
    one = pickle.loads(pickle.dumps(ChatJudge(server.endpoint, "m", JudgePrompt(PROMPT), requests_per_minute=600)))
    (answer,) = one.ask(deque([JudgeQuestion(0, "", "c0")]))
    assert answer.verdict == "yes"
    assert answer.model == "judge-2"
    assert one._pace._per_minute == 600


@pytest.mark.parametrize(
    "address",
    [
        "", "localhost:8000", "ftp://x/v1", "http://", "http://u:p@x/v1", "http://key@x/v1", "http://x:99999/v1", "http://x/v1#a",
        "http://x/a b", "http://x/a\n", "http://ü/v1", "http://[::1/v1",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_without_a_password_in_the_message(address):
    with pytest.raises(ValueError, match="endpoint: ") as raised:
        ChatJudge(address, "m", JudgePrompt(PROMPT))
    assert "u:p" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"concurrency": 0}, "concurrency: 0"),
        ({"concurrency": True}, "concurrency: True"),
        ({"attempts": 1.5}, "attempts: 1.5"),
        ({"timeout": 0}, "timeout: 0"),
        ({"timeout": float("nan")}, "timeout: nan"),
        ({"requests_per_minute": -1}, "requests_per_minute: -1"),
        ({"parameters": {"model": "x"}}, "model cannot be set here"),
        ({"parameters": {"temperature": float("inf")}}, "parameters: "),
        ({"parameters": [1]}, "parameters: "),
        ({"model": ""}, "model: ''"),
    ],
)
def test_arguments_out_of_range_are_named(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        ChatJudge("http://x/v1", **{"model": "m", "prompt": JudgePrompt(PROMPT), **options})


def test_an_address_may_be_of_the_sixth_version_and_may_end_with_the_whole_path(start):
    for address in ("http://[::1]/v1", "http://[::1]:80/v1/", "http://[::1]/v1/chat/completions"):
        one = ChatJudge(address, "m", JudgePrompt(PROMPT)).endpoint
        assert (one.host, one._port, one._target) == ("::1", 80, "/v1/chat/completions")
    assert ChatJudge("https://x/v1?api-version=3", "m", JudgePrompt(PROMPT)).endpoint._target == "/v1/chat/completions?api-version=3"


def test_parameters_are_sent(start):
    server = start(by_number)
    ask(server, 1, parameters={"temperature": 0.5, "max_tokens": 9})
    assert server.bodies[0]["temperature"] == 0.5


def test_texts_of_rollouts_stay_as_they_are():
    prompt = JudgePrompt("{x} {prompt} and {completion} {")
    assert prompt.about("a {completion} \\1", "{prompt}").startswith("{x} a {completion} \\1 and {prompt} {\n\n")
    with pytest.raises(ValueError, match=r"lacks \{completion\}"):
        JudgePrompt("{prompt}")


def test_a_version_is_of_all_that_the_judge_is_told(tmp_path):
    assert JudgePrompt(PROMPT).version == JudgePrompt(PROMPT).version != JudgePrompt(PROMPT + " ").version
    assert JudgePrompt(PROMPT, "3").version == "3"
    (tmp_path / "p.txt").write_bytes(b"\xff{completion}")
    with pytest.raises(ValueError, match=r"p\.txt: not UTF-8"):
        JudgePrompt.read(tmp_path / "p.txt")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("VERDICT: yes", "yes"),
        ("because\n\n  VERDICT: unsure  \n\n", "unsure"),
        ("it wrote\nVERDICT: no\nVERDICT: no", "no"),
        ("it wrote\nVERDICT: yes\nVERDICT: no", None),
        ("VERDICT: yes.", None),
        ("VERDICT: maybe", None),
        ("my VERDICT: yes", None),
        ("VERDICT: yes\nVERDICT: maybe", None),
        ("", None),
    ],
)
def test_verdicts_are_read_strictly(text, verdict):
    assert verdict_in(text) == verdict
