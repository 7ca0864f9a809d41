"""Labelling in a real browser, by keys: blind, by two people at once, through reloads, and with a connection that breaks."""

from __future__ import annotations

import subprocess
import sys

import pytest
from made_run import made_run
from reviewed import Review

from probescore_audit.record import read_record


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    for place in range(7):
        made_run(folder / str(place), 64, 2, seed=place)
    return folder


@pytest.fixture(scope="module")
def review(chromium, folders):
    with Review(*sorted(folders.iterdir()), cache=folders.parent / "cache") as running:
        for place in range(7):
            running.post(f"/api/runs/{place}/plan", {"per_step": 4})
        yield running


def labels_of(folder):
    return [row for row in read_record(folder, texts=False).labels if row.source == "person"]


def saved(seen):
    seen.until("document.querySelector('.given') !== null")


def test_scores_are_hidden_until_the_label_is_given(window, review):
    seen = window()
    page = seen.open("#/0/label?labeller=ann")
    handed = review.get("/api/runs/0/queue", labeller="ann")["rollout"]["rollout"]
    told = review.get(f"/api/runs/0/rollouts/{handed.replace(':', '%3A')}")
    text = page.inner_text("main")
    assert told["completion"][:30].strip() in text
    for hidden in ("cheating", "reward", "threshold", "frozen"):
        assert hidden not in text
    assert page.locator(".token.above, .token.below").count() == 0
    assert any("blind=1" in each for each in seen.asked)
    page.locator(".token").first.hover()
    assert "token 1 of 40" in page.inner_text("#tip")
    assert "score" not in page.inner_text("#tip")

    seen.press("y")
    saved(seen)

    shown = page.inner_text("main")
    assert f"{told['scores']['cheating@1']['frozen']['mean']:.2f}".replace("-", "−") in shown
    assert page.locator(".token.above, .token.below").count() > 0
    assert page.inner_text(".given") == "Saved: yes"
    seen.press("Enter")
    seen.until("document.querySelector('.question') !== null")
    assert "frozen" not in page.inner_text("main")


def test_every_answer_note_span_and_undo_is_in_the_record(window, folders):
    seen = window()
    page = seen.open("#/1/label?labeller=ann")
    handed = []
    for key in "ynu":
        handed.append(page.locator(".token").count())
        seen.press("m")
        page.keyboard.type(f"note {key} <b>")
        seen.press("Escape", key)
        saved(seen)
        seen.press("Enter")
        seen.until("document.querySelector('.question') !== null")
    first = page.locator(".token").nth(2).bounding_box()
    last = page.locator(".token").nth(5).bounding_box()
    page.mouse.move(first["x"] + 8, first["y"] + 8)
    page.mouse.down()
    page.mouse.move(last["x"] + 4, last["y"] + 8, steps=6)
    page.mouse.up()
    assert "tokens 3 to 6" in page.inner_text(".chips")
    seen.press("t", "End", "Shift+ArrowLeft", "Shift+ArrowLeft", "Enter")
    assert page.locator(".chips li").count() == 2
    assert page.locator(".token.drawn").count() == 7
    seen.press("y")
    saved(seen)

    rows = labels_of(folders / "1")
    assert [(row.label, row.note) for row in rows] == [("yes", "note y <b>"), ("no", "note n <b>"), ("unsure", "note u <b>"), ("yes", None)]
    assert rows[3].spans == [[2, 6], [37, 40]]
    assert all(row.labeller == "ann" and row.inclusion for row in rows)

    seen.press("z")
    seen.until("document.querySelector('.question') !== null")
    assert page.locator(".chips li").count() == 2, "the spans are there again"
    assert labels_of(folders / "1") == rows[:3]
    seen.press("d", "n")
    saved(seen)
    assert labels_of(folders / "1")[-1].label == "no"
    assert not labels_of(folders / "1")[-1].spans


def test_two_people_at_once_get_rollouts_of_their_own(window, review, folders):
    planned = review.get("/api/runs/2/queue", labeller="ann")["of"]
    people = {name: window() for name in ("ann", "bob")}
    for name, seen in people.items():
        seen.open(f"#/2/label?labeller={name}&onward=1")
    for _ in range(40):
        going = False
        for seen in people.values():
            if seen.page.locator(".question").count():
                before = seen.page.inner_text("#content")
                seen.press("n")
                seen.until("before => document.getElementById('content').innerText !== before", before)
                going = True
        if not going:
            break

    rows = labels_of(folders / "2")
    rollouts = [(row.step, row.rollout) for row in rows]
    assert len(rollouts) == len(set(rollouts)) == planned
    assert {row.labeller for row in rows} == {"ann", "bob"}
    assert all(row.inclusion for row in rows)
    for seen in people.values():
        seen.open("#/2/label")
        if seen.page.locator("#labeller").count():  # the name is asked for once in a browser
            raise AssertionError("the name was forgotten")
        assert "All that the plan asks for is labelled" in seen.page.inner_text("main")


def test_a_reload_in_the_middle_loses_nothing(window, folders):
    seen = window(390, 844, "dark")
    page = seen.open("#/3/label?labeller=ann")
    text = page.inner_text(".tokens")
    page.fill("#note", "half a thought")
    page.locator(".token").nth(4).dblclick()
    assert "tokens 5 to 5" in page.inner_text(".chips")

    page.reload()
    seen.settled()

    assert page.inner_text(".tokens") == text
    assert page.input_value("#note") == "half a thought"
    assert "tokens 5 to 5" in page.inner_text(".chips")
    seen.press("u")
    saved(seen)
    page.reload()
    seen.settled()
    assert page.inner_text(".tokens") != text
    seen.press("z")
    seen.until("text => document.querySelector('.tokens')?.innerText === text", text)
    assert page.input_value("#note") == "half a thought"
    assert "tokens 5 to 5" in page.inner_text(".chips")
    assert labels_of(folders / "3") == []


def test_a_label_that_could_not_be_saved_is_said_and_kept(window, folders):
    seen = window()
    page = seen.open("#/4/label?labeller=ann")
    text = page.inner_text(".tokens")
    page.route("**/labels", lambda route: route.abort())
    page.fill("#note", "what I saw")
    seen.press("Escape", "y")
    seen.until("document.getElementById('alarm').innerText.includes('Not saved')")
    assert labels_of(folders / "4") == []

    page.reload()
    seen.settled()
    assert "is not saved yet" in page.inner_text("#alarm")
    assert page.inner_text(".tokens") == text
    page.unroute("**/labels")
    seen.press("y")
    saved(seen)

    assert [(row.label, row.note) for row in labels_of(folders / "4")] == [("yes", "what I saw")]
    assert page.inner_text("#alarm") == ""


def test_a_key_that_is_held_down_gives_one_label(window, folders):
    seen = window()
    page = seen.open("#/5/label?labeller=ann&onward=1")
    for _ in range(12):
        page.keyboard.down("n")  # from the second on a repetition
        page.wait_for_timeout(150)
    page.keyboard.up("n")
    assert len(labels_of(folders / "5")) == 1


def test_a_rollout_that_somebody_else_labelled_meanwhile_is_passed_on(window, review, folders):
    seen = window()
    page = seen.open("#/6/label?labeller=ann")
    handed = review.get("/api/runs/6/queue", labeller="ann")["rollout"]["rollout"]
    review.post("/api/runs/6/labels", {"rollout": handed, "label": "no", "labeller": "bob"})

    text = page.inner_text(".tokens")
    seen.press("y")
    seen.until("document.getElementById('alarm').innerText.includes('bob')")
    seen.press("Enter")
    seen.until("text => document.querySelector('.tokens').innerText !== text", text)

    assert [row.labeller for row in labels_of(folders / "6")] == ["bob"]
    page.goto(f"http://{review.host}/#/6/label/{handed.replace(':', '%3A')}?labeller=ann")
    page.reload()
    seen.settled()
    assert "cheating" not in page.inner_text("main"), "blind, too"
    seen.press("n")
    saved(seen)
    assert [(row.labeller, row.second) for row in labels_of(folders / "6")] == [("bob", False), ("ann", True)]


def test_a_killed_server_that_comes_back_takes_the_label_that_was_given_meanwhile(window, tmp_path):
    made_run(tmp_path / "run", 64, 2)
    first = Review(tmp_path / "run", cache=tmp_path / "cache")
    first.post("/api/runs/0/plan", {"per_step": 4})
    seen = window(host=first.host)
    page = seen.open("#/0/label?labeller=ann")
    seen.press("n")
    saved(seen)
    seen.press("Enter")
    seen.until("document.querySelector('.question') !== null")

    first.kill()
    seen.press("y")
    seen.until("document.getElementById('alarm').innerText.includes('Not saved')")
    port = first.host.partition(":")[2]
    command = [
        sys.executable,
        "-m",
        "probescore_server.cli",
        "review",
        str(tmp_path / "run"),
        "--port",
        port,
        "--cache",
        str(tmp_path / "cache"),
    ]
    again = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert any("http://" in line for line in again.stderr)
        seen.press("y")  # the page was given its token by the server that was killed
        saved(seen)
    finally:
        again.terminate()
        again.wait(20)

    assert sorted(row.label for row in labels_of(tmp_path / "run")) == ["no", "yes"]
    assert page.inner_text("#alarm") == ""
