"""The page holds every number, needs nothing else, and treats what models wrote as data."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from views import INFO, answer, loaded_probe, probe_scores, scored_probe, threshold

from probescore import Completion, ProbeScores, Reduction, ScoreUnit, Span, UnmetCondition
from probescore_server.cli.report.page import page, write_page
from probescore_server.cli.report.views import RolloutView, rollout_views, series_of

CHEATING, MOOD = scored_probe(), scored_probe("mood", unit=ScoreUnit.PROBABILITY)
SERIES = series_of([CHEATING, MOOD], [loaded_probe(CHEATING, threshold(2.0))])
HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=alert(1)>",
    "<!--",
    "]]>",
    "\"'`",
    "&lt;",
    "\\u003c",
    "\u2028",
    "\u202eevil",
    "\x00",
]


class Elements(HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs
        self._in_script = tag == "script"

    def handle_endtag(self, tag):
        self._in_script = False

    def handle_data(self, data):
        if self._in_script:
            self.scripts.append(data)


def rollout(completion: Completion, cheating: ProbeScores, mood: ProbeScores, texts: list[str] | None = None) -> list[RolloutView]:
    return rollout_views("group 1", completion, answer(completion, texts, cheating=cheating, mood=mood), SERIES)


def simple(texts: list[str], title: str = "1 scored rollout") -> str:
    zeros = [0.0] * len(texts)
    views = rollout(Completion(list(range(len(texts)))), probe_scores([0.0], zeros), probe_scores([0.5], zeros), texts)
    return page(views, SERIES, INFO, title=title)


def data_of(html: str) -> dict:
    return json.loads(Elements(html).scripts[0])


def test_every_number_of_every_probe_is_there():
    completion = Completion([7, 8], mask=[1, 0], spans=(Span("tool", 1, 2),), id="x")
    views = rollout(completion, probe_scores([2.5, None], [3.0, -1.25]), probe_scores([0.75, 0.5], None), ["a", "b"])

    data = data_of(page(views, SERIES, INFO, title="one"))

    (shown,) = data["rollouts"]
    assert shown["title"] == "group 1 · x"
    assert [data["pieces"][index] for index in shown["tokens"]] == [[7, "a"], [8, "b"]]
    assert [data["pieces"][index] for index in data["contexts"][shown["context"]]] == [[1, "<p>"], [2, " q"]]
    assert shown["masked"] == [1]
    assert shown["spans"] == [["tool", 1, 2]]
    assert shown["scores"] == [
        {"reduced": {"": [2.5], "tool": [None]}, "tokens": [3.0, -1.25], "flagged": True},
        {"reduced": {"": [0.75], "tool": [0.5]}, "tokens": None, "flagged": None},
    ]
    assert [entry["name"] for entry in data["series"]] == ["cheating", "mood"]
    assert data["series"][0]["threshold"] == {"value": 2.0, "rate": 0.05, "low": 0.03, "high": 0.08, "negatives": 400}
    assert data["series"][0]["centre"] == 2.0
    assert data["series"][1]["threshold"] is None


def test_a_threshold_that_was_not_found_on_such_a_rollout_is_doubted():
    scores = replace(probe_scores([2.5], [3.0, -1.25]), unmet=(UnmetCondition("prompt_shape", Reduction.parse("mean")),))
    views = rollout(Completion([7, 8]), scores, probe_scores([0.75], None), ["a", "b"])
    (shown,) = data_of(page(views, SERIES, INFO, title="one"))["rollouts"]
    assert [entry.get("outside") for entry in shown["scores"]] == [["prompt shape"], None]


def test_a_prompt_and_a_piece_are_written_once():
    views = rollout(Completion([7]), probe_scores([0], [0]), probe_scores([0], [0]), ["a"]) * 50

    data = data_of(page(views, SERIES, INFO, title="fifty"))

    assert len(data["contexts"]) == 1
    assert len(data["pieces"]) == 3
    assert len(data["rollouts"]) == 50


@given(st.lists(st.sampled_from(HOSTILE) | st.text(max_size=5), min_size=1, max_size=4))
def test_hostile_tokens_never_become_markup(texts):
    html, harmless = simple(texts, title=texts[0]), simple(["a"] * len(texts), title="a")

    assert Elements(html).names == Elements(harmless).names
    assert Elements(html).scripts[1:] == Elements(harmless).scripts[1:]
    assert data_of(html)["title"] == texts[0]


def test_the_data_holds_no_character_that_could_end_it():
    data = Elements(simple(HOSTILE)).scripts[0]

    assert not re.search("[<>&\u2028\u2029\u202e\x00]", data)


def test_the_page_needs_nothing_else():
    html = simple(["a"])
    elements = Elements(html)

    assert not {name for name, _ in elements.attributes} & {"src", "href", "srcset", "action", "onclick", "onload"}
    assert not {"link", "img", "iframe", "object", "base"} & set(elements.names)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttpRequest|innerHTML|eval\(", html)
    assert "default-src 'none'" in html


def test_a_page_is_written_as_utf8(tmp_path):
    views = rollout(Completion([7]), probe_scores([0], [0]), probe_scores([0], [0]), ["日本語"])

    write_page(tmp_path / "page.html", views, SERIES, INFO, title="one")

    assert data_of((tmp_path / "page.html").read_text("utf-8"))["pieces"][-1] == [7, "日本語"]


# ----------------------------------------------------------------------------------------------------------------- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

DRIVER = """
<script>
const seen = {};
const tokens = () => [...document.querySelectorAll("article .text:not(.context) .token")];
function hover(element) {
  element.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, clientX: 5, clientY: 5 }));
  return byId("tip").textContent;
}
function choose(id, value) {
  byId(id).value = value;
  byId(id).dispatchEvent(new Event(byId(id).type === "search" ? "input" : "change"));
}
data.rollouts.forEach(draw);
seen.tip = hover(tokens()[0]);
seen.colours = tokens().slice(0, 3).map((token) => token.style.backgroundColor.replaceAll(" ", ""));
seen.text = tokens().slice(0, 3).map((token) => token.textContent);
seen.masked = tokens().slice(0, 3).map((token) => token.classList.contains("masked"));
seen.maskedTip = hover(tokens()[2]);
choose("series", "1");
seen.secondTip = (hover(document.body), hover(tokens()[0]));
seen.secondFacts = document.querySelector(".facts").textContent;
choose("series", "0");
choose("order", "low");
seen.lowFirst = [...document.querySelectorAll("article h2")].map((heading) => heading.textContent);
choose("order", "high");
seen.highFirst = [...document.querySelectorAll("nav .name")].map((name) => name.textContent);
choose("filter", "SECOND");
seen.found = [...document.querySelectorAll("article h2")].map((heading) => heading.textContent);
choose("filter", "");
byId("flagged").click();
seen.flagged = [...document.querySelectorAll("article h2")].map((heading) => heading.textContent);
seen.title = document.title;
document.body.setAttribute("data-seen", JSON.stringify(seen));
</script>
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What a reader of a page with two rollouts and one that failed gets to see, and how it answers."""
    completion = Completion([7, 8, 9], mask=[1, 1, 0], id="first")
    texts = [HOSTILE[0], " up", " out"]
    views = rollout(completion, probe_scores([-1.0], [-6.0, 9.0, 9.0]), probe_scores([0.5], [0.25, 0.5, 0.5]), texts)
    views += rollout(Completion([7], id="second"), probe_scores([3.0], [3.0]), probe_scores([0.5], [0.5]), ["x"])
    views.append(RolloutView("third", (), views[0].tokens, "NaN", False))
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(page(views, SERIES, INFO, title="three").replace("</body>", DRIVER + "</body>"), encoding="utf-8")
    return read_in_browser(file)


def read_in_browser(file: Path) -> dict:
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={file.parent / 'profile'}",
    ]
    run = subprocess.run([*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(dict(Elements(run.stdout).attributes)["data-seen"] or "")


@in_a_browser
def test_the_pointer_shows_the_number_the_text_and_the_id(seen):
    assert seen["tip"].startswith("-6.00")
    assert "id 7" in seen["tip"]
    assert "token 0 of 3" in seen["tip"]


@in_a_browser
def test_hostile_tokens_are_text_in_a_browser_too(seen):
    assert seen["text"][0] == HOSTILE[0]
    assert seen["title"] == "three"


@in_a_browser
def test_colours_say_on_which_side_of_the_threshold_a_token_lies(seen):
    below, above, masked = seen["colours"]

    assert "--below" in below
    assert "--above" in above
    assert masked == ""
    assert seen["masked"] == [False, False, True]
    assert "masked: does not count" in seen["maskedTip"]


@in_a_browser
def test_another_probe_can_be_chosen(seen):
    assert seen["secondTip"].startswith("0.25")
    assert "mean 0.5" in seen["secondFacts"]


@in_a_browser
def test_rollouts_can_be_ordered_and_those_without_a_number_come_last(seen):
    assert seen["lowFirst"] == ["group 1 · first", "group 1 · second", "third"]
    assert seen["highFirst"] == ["group 1 · second", "group 1 · first", "third"]


@in_a_browser
def test_rollouts_can_be_found_and_the_flagged_ones_picked(seen):
    assert seen["found"] == ["group 1 · second"]
    assert seen["flagged"] == ["group 1 · second"]
