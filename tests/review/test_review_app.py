"""What the application answers to whom: hosts, tokens, policies, hostile texts, large texts, and that it says no more than it must."""

from __future__ import annotations

import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse

import pytest
from made_run import KEY, made_run
from reviewed import Refused, Review

from probescore_audit.record import RecordedProbe, RecordWriter, RolloutRow, RunHeader, read_record

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</pre></body><h1>x",
    "\x1b[2J\x1b]0;title\x07",
    "\u202eevil\u2066\u2069\u200f",
    "\u200b\u200d\ufeff\u2028\u2029",
    "\0\x01\x7f\x9b",
    "half \ud800 a character \udc00",
    "😀 e\u0301" + "\u0301" * 400,
    "javascript:alert(1)",
    "{{7*7}} ${7*7} <%= 7 %>",
    "' OR '1'='1'; DROP TABLE rollouts; --",
    "%s%n %00 ../../etc/passwd",
    "&lt;b&gt; &amp; &#x3c;",
    '=HYPERLINK("http://x")',
    "a" * 2000,
    "\U0010ffff\ufffe\uffff",
]


def whole(text):
    """The text with what UTF-8 cannot hold replaced."""
    return text.encode("utf-8", "replace").decode()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """200 rollouts whose every text is hostile: names, prompts, completions, pieces, probes."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    probes = [RecordedProbe(key='<b>"x@1', thresholds={"mean": 0.0}), RecordedProbe(key=KEY, thresholds={"mean": 0.0})]
    rng = random.Random(0)
    texts = {}
    with RecordWriter(folder, RunHeader(run_id="<i>run</i>\u202e", planned_steps=2, probes=probes), keep_texts=True) as writer:
        for index in range(200):
            pieces = [rng.choice(HOSTILE) for _ in range(4)]
            name = whole(f"{index} {HOSTILE[index % len(HOSTILE)][:40]}")
            texts[f"0:{name}"] = pieces
            score = {"frozen": {"mean": float(index)}, "policy": {"mean": 1.0}}
            writer.append(
                [
                    RolloutRow(
                        step=0,
                        rollout=name,
                        prompt=HOSTILE[index % 7],
                        scores={probes[0].key: score, KEY: score},
                        prompt_text=rng.choice(HOSTILE),
                        completion_text="".join(pieces),
                        completion_pieces=pieces,
                        token_scores={KEY: {"frozen": [1.0] * 4}},
                    )
                ]
            )
    return folder, texts


@pytest.fixture(scope="module")
def review(hostile, tmp_path_factory):
    with Review(hostile[0], cache=tmp_path_factory.mktemp("cache")) as running:
        yield running


def quoted(text):
    return urllib.parse.quote(text, safe="")


def test_hostile_texts_arrive_as_they_are_and_are_never_markup(review, hostile):
    _, texts = hostile
    rows = review.get("/api/runs/0/rollouts", limit=1000)["rows"]

    assert {row["rollout"] for row in rows} == set(texts)
    for name, pieces in texts.items():
        found = review.get(f"/api/runs/0/rollouts/{quoted(name)}")
        assert [token["text"] for token in found["tokens"]] == pieces
        assert found["completion"] == "".join(pieces)
        given = review.label(name, "unsure", note=pieces[0])
        assert given["rollout"]["labels"][0]["note"] == whole(pieces[0])
    for path in ("overview", "suspicious", "columns", "repair", "jobs"):
        review.get(f"/api/runs/0/{path}")
    with review.raw("GET", "/api/runs/0/export?format=html") as answer:
        page = answer.read().decode()
    assert "<script" not in page
    assert "<img" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert page.count("<article>") == 200
    with review.raw("GET", "/api/runs/0/export?format=jsonl") as answer:
        assert answer.headers["Content-Disposition"].isascii()
        assert len([json.loads(line) for line in answer.read().splitlines()]) == 200


def test_a_text_of_a_megabyte_and_a_long_rollout_come_in_parts(tmp_path):
    folder = tmp_path / "run"
    with RecordWriter(folder, RunHeader(run_id="r", planned_steps=1), keep_texts=True) as writer:
        score = {KEY: {"frozen": {"mean": 0.0}}}
        writer.append([RolloutRow(step=0, rollout="text", prompt="p", scores=score, completion_text="x" * 2**20)])
        pieces = [f" {index}" for index in range(50_000)]
        tokens = {KEY: {"frozen": [0.5] * 50_000}}
        writer.append([RolloutRow(step=0, rollout="long", prompt="p", scores=score, completion_pieces=pieces, token_scores=tokens)])
        writer.append([RolloutRow(step=0, rollout="one", prompt="p", scores=score, completion_pieces=["y" * 2**20, "z"], token_scores={})])
    with Review(folder, cache=tmp_path / "cache") as review:
        for name, whole in (("text", "x" * 2**20), ("long", "".join(pieces)), ("one", "y" * 2**20 + "z")):
            begun = time.monotonic()
            found = review.get(f"/api/runs/0/rollouts/0:{name}")
            texts = [found["completion"]] + [
                review.get(f"/api/runs/0/rollouts/0:{name}", part=part)["completion"] for part in range(1, found["parts"])
            ]
            assert "".join(texts) == whole
            assert time.monotonic() - begun < 20
        assert found["token_count"] == 2
        assert review.get("/api/runs/0/rollouts")["total"] == 3
        assert len(json.dumps(review.get("/api/runs/0/rollouts"))) < 10_000, "a table has the first words alone"
        last = review.get("/api/runs/0/rollouts/0:long", part=2)
        assert (last["tokens_from"], len(last["tokens"]), last["tokens"][0]["text"]) == (40_000, 10_000, " 40000")
        assert review.label("0:long", "yes", spans=[[49_999, 50_000]])["label_id"]


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "",
        "localhost.",
        "[::2]",
        "0.0.0.0",  # noqa: S104 - a name that is asked for
        "169.254.1.1",
        "127.0.0.1@evil.example",
    ],
)
def test_a_name_of_another_site_is_not_answered(review, host):
    with pytest.raises(Refused) as refused:
        review.asked("GET", "/api/session", headers={"Host": host})

    assert refused.value.status == 403
    assert review.token not in refused.value.sentence


@pytest.mark.parametrize("host", ["localhost", "localhost:9999", "127.0.0.1", "[::1]", "[::1]:80", "LOCALHOST"])
def test_names_of_this_machine_are_answered(review, host):
    assert review.asked("GET", "/api/session", headers={"Host": host})["token"]


@pytest.mark.parametrize("site", ["cross-site", "same-site", "x"])
def test_another_sites_page_gets_no_answer(review, site):
    for path in ("/api/session", "/api/runs/0/queue?labeller=ann", "/api/runs/0/export"):
        with pytest.raises(Refused) as refused:
            review.asked("GET", path, headers={"Sec-Fetch-Site": site})
        assert refused.value.status == 403
    assert review.asked("GET", "/api/session", headers={"Sec-Fetch-Site": "same-origin"})


def test_nothing_is_changed_without_the_token(review):
    changes = [
        ("POST", "/api/runs/0/labels", {"rollout": "0:x", "label": "yes", "labeller": "eve"}),
        ("POST", "/api/runs/0/labels/x/undo", {"labeller": "eve"}),
        ("POST", "/api/runs/0/plan", {"per_step": 4}),
        ("POST", "/api/runs/0/repair", {"step": "audit"}),
        ("PUT", "/api/runs/0/views/x", {"title": "x"}),
        ("DELETE", "/api/runs/0/views/x", None),
    ]
    for method, path, body in changes:
        for token in ("", "x", review.token[:-1]):
            with pytest.raises(Refused) as refused:
                review.asked(method, path, body, headers={"X-Probescore-Review": token})
            assert refused.value.status == 403
    with pytest.raises(urllib.error.HTTPError) as refused:
        review.raw("OPTIONS", "/api/runs/0/labels", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"})
    assert refused.value.code in (403, 405)
    assert "Access-Control-Allow-Origin" not in refused.value.headers


@pytest.mark.parametrize(
    "path", ["/", "/static/main.js", "/api/runs", "/api/nix", "/api/runs/9/overview", "/static/nix.js", "/api/runs/0/export?format=html"]
)
def test_every_answer_has_the_policy(review, path):
    try:
        answer = review.raw("GET", path)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy.replace("http-equiv", "")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/static/....//app.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/../../etc/passwd",
        "/api/../../etc/passwd",
        "/api/runs/..%2f..%2fetc",
        "/api/runs/0/rollouts/..%2f..%2fetc%2fpasswd",
        "/api/runs/0/rollouts/0:..%2f..%2fetc%2fpasswd",
        "/api/runs/0/views/..%2fx",
        "/api/jobs/..%2fx",
    ],
)
def test_paths_lead_nowhere_else(review, path):
    connection = http.client.HTTPConnection(review.host, timeout=30)
    connection.putrequest("GET", path, skip_host=False)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read().decode()

    assert "root:" not in body
    assert "create_app" not in body
    assert answer.status in (200, 404, 405)
    if answer.status == 200:
        assert body.lstrip().lower().startswith("<!doctype html"), "the page, and no other file"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/api/runs/0/rollouts?limit=0", None, 400),
        ("GET", "/api/runs/0/rollouts?limit=1000000", None, 400),
        ("GET", "/api/runs/0/rollouts?limit=x", None, 400),
        ("GET", "/api/runs/0/rollouts?offset=-1", None, 400),
        ("GET", "/api/runs/0/rollouts?where=[[", None, 400),
        ("GET", "/api/runs/0/rollouts?where=" + quoted(json.dumps([["nix", "=", 1]])), None, 400),
        ("GET", "/api/runs/0/rollouts?sort=nix", None, 400),
        ("GET", "/api/runs/0/rollouts?view=nix", None, 404),
        ("GET", "/api/runs/0/rollouts?q=" + quoted('"*^(NEAR'), None, 200),
        ("GET", "/api/runs/0/rollouts/nix", None, 404),
        ("GET", "/api/runs/0/rollouts/99999999999999999999:x", None, 404),
        ("GET", "/api/runs/0/queue", None, 400),
        ("GET", "/api/runs/0/export?format=exe", None, 400),
        ("GET", "/api/jobs/nix", None, 404),
        ("POST", "/api/runs/0/labels", [1], 400),
        ("POST", "/api/runs/0/labels", {"rollout": 1, "label": "yes", "labeller": "a"}, 400),
        ("POST", "/api/runs/0/labels", {"rollout": "0:x", "label": "yes", "labeller": "a", "inclusion": 1}, 400),
        ("POST", "/api/runs/0/labels", {"rollout": "0:x", "label": "yes", "labeller": "a"}, 404),
        ("POST", "/api/runs/0/labels", {"rollout": "0:\ud800", "label": "yes", "labeller": "a"}, 400),
        ("POST", "/api/runs/0/labels", {"rollout": "0:x", "label": "yes", "labeller": "\ud800"}, 400),
        ("POST", "/api/runs/0/labels/nix/undo", {"labeller": "a"}, 404),
        ("POST", "/api/runs/0/plan", {}, 400),
        ("POST", "/api/runs/0/plan", {"per_step": 1}, 400),
        ("POST", "/api/runs/0/plan", {"per_step": 8, "more": 8}, 400),
        ("PUT", "/api/runs/0/views/x", {"where": "["}, 400),
        ("DELETE", "/api/runs/0/views/nix", None, 404),
        ("POST", "/api/nix", {}, 405),
        ("PATCH", "/api/runs", {}, 405),
    ],
)
def test_wrong_requests_are_answered_with_a_sentence(review, hostile, method, path, body, status):
    if status == 200:
        assert review.asked(method, path, body) is not None
        return
    with pytest.raises(Refused) as refused:
        review.asked(method, path, body)
    assert refused.value.status == status
    assert refused.value.sentence
    for inside in ("Traceback", str(hostile[0].parent), "sqlite"):
        assert inside not in refused.value.sentence


def test_a_large_body_is_refused(review):
    connection = http.client.HTTPConnection(review.host, timeout=30)
    headers = {"X-Probescore-Review": review.token, "Content-Type": "application/json"}
    connection.request("POST", "/api/runs/0/labels", headers=headers | {"Content-Length": str(5 * 2**20)})
    assert connection.getresponse().status == 413, "before any of it is read"
    connection.close()
    try:
        connection.request("POST", "/api/runs/0/labels", iter([b" " * 2**20] * 6), headers, encode_chunked=True)
        assert connection.getresponse().status >= 400
    except (ConnectionError, http.client.HTTPException):
        pass  # closed before the whole was read
    assert review.get("/api/session")["token"] == review.token, "and goes on"


def test_it_listens_on_this_machine_alone(review):
    port = int(review.host.rpartition(":")[2])
    with socket.socket() as other:
        other.settimeout(2)
        try:
            address = socket.gethostbyname(socket.gethostname())
        except OSError:
            pytest.skip("this machine has no other address")
        if address.startswith("127."):
            pytest.skip("this machine has no other address")
        assert other.connect_ex((address, port)) != 0


def test_several_runs_and_a_run_that_goes_on(tmp_path):
    made_run(tmp_path / "one", 80, 2)
    made_run(tmp_path / "two", 160, 4, texts=False)
    with Review(tmp_path / "one", tmp_path / "two", cache=tmp_path / "cache") as review:
        runs = review.get("/api/runs")["runs"]
        assert [(run["run"], run["rollouts"], run["has_texts"], run["has_tokens"]) for run in runs] == [
            ("0", 80, True, True),
            ("1", 160, False, False),
        ]
        header = RunHeader(run_id="made-160", planned_steps=4, launch="", rank=1, world_size=1)
        with RecordWriter(tmp_path / "two", header) as writer:
            writer.append([RolloutRow(step=9, rollout="new", prompt="p", scores={KEY: {"frozen": {"mean": 5.0}}})])
        time.sleep(1.1)
        assert review.get("/api/runs")["runs"][1]["steps"] == [0, 9]
        assert review.get("/api/runs/1/rollouts/9:new")["said"].startswith("The record keeps no texts")


def said_by(*arguments):
    command = [sys.executable, "-m", "probescore_server.cli", "review", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_what_is_wrong_is_one_line(tmp_path):
    made_run(tmp_path / "run", 80, 2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, what in (
            ([tmp_path / "nix"], "nix: no record"),
            ([tmp_path / "run", "--model", "m"], "--probes"),
            ([tmp_path / "run", "--threshold", "a@1=2"], "--threshold"),
            ([tmp_path / "run", "--port", port], "in use"),
        ):
            ran = said_by(*arguments, "--cache", tmp_path / "cache")
            assert ran.returncode == 2
            assert what in ran.stderr.splitlines()[-1]
            assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_well(tmp_path, number):
    made_run(tmp_path / "run", 80, 2)
    review = Review(tmp_path / "run", cache=tmp_path / "cache")
    review.label("0:0.0", "no")
    review.process.send_signal(number)
    assert review.process.wait(20) == 0
    assert len(read_record(tmp_path / "run").labels) == 1
