"""Texts of models are hostile: nothing of 200 of them runs, breaks a page, or hides what it is."""

from __future__ import annotations

import hashlib
import itertools
import unicodedata
import urllib.parse

import pytest
from reviewed import Review

from probescore_audit.record import RecordedProbe, RecordWriter, RolloutRow, RunHeader
from probescore_server.cli.common.visible import visible

MARKUP = [
    "<script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 1'>",
    "<svg/onload=window.ran=1>",
    "</script><script>window.ran=1</script>",
    "</textarea></title></style><iframe srcdoc='<script>parent.ran=1</script>'>",
    "<a href='javascript:window.ran=1'>here</a>",
    "javascript:window.ran=1",
    "<style>body { display: none }</style>",
    "<base href='http://example.org/'>",
    "<meta http-equiv=refresh content='0;url=http://example.org'>",
    "<form action=http://example.org><button>Label</button></form>",
    "<link rel=stylesheet href=//example.org/x.css>",
    "<math><mtext></form><form><mglyph><style></math><img src onerror=window.ran=1>",
    "{{constructor.constructor('window.ran=1')()}} ${window.ran=1} <%= window.ran=1 %>",
    "'\"><b id=content>",
    "&lt;b&gt; &#x202e; &amp;",
    "__proto__",
    "constructor",
    "<template><script>window.ran=1</script></template>",
    "<div style='position:fixed;inset:0;z-index:99'>over all</div>",
]
UNSEEN = [
    "\x1b[31mred\x1b[0m",
    "\x1b]8;;http://example.org\x07link\x1b]8;;\x07",
    "\u202eevil\u202c",
    "\u2066a\u2069\u200f",
    "zero\u200bwidth\ufeff",
]
UNSEEN += [
    "\0nul\x07\x08",
    "a\u2028b\u2029c",
    "\U000e0041\U000e0042tags",
    "\ue000private\U0010ffff",
    "\ud800half",
    "\u00adsoft\u061c",
    "\x7f\x9b31m",
]
ODD = [
    "z" + "\u0301" * 400,
    "\ufdfd" * 40,
    "A" * 1_000_000,
    "مرحبا بالعالم",
    "שלום " * 30,
    "👩‍👩‍👧‍👦",
    "\r\n\r\n\t\t",
    "",
    " " * 5000,
    "\n" * 3000,
]
WRAPPED = ["{}", "before {} after", "\n{}\n", '"{}"', "{}{}"]
CASES = [shape.replace("{}", text) for shape, text in itertools.product(WRAPPED, [*MARKUP, *UNSEEN, *ODD])][:200]
SEEN = {"\u202e": "⟨202E⟩", "\x1b": "⟨1B⟩", "\u200b": "⟨200B⟩", "\0": "⟨00⟩", "\u2028": "⟨2028⟩", "\ue000": "⟨E000⟩", "\ud800": "⟨D800⟩"}


@pytest.fixture(scope="module")
def review(chromium, tmp_path_factory):
    """A review of a record in which everything that can be hostile is: texts, tokens, names of prompts and of the run."""
    folder = tmp_path_factory.mktemp("hostile")
    key = "cheating@1"
    header = RunHeader(
        run_id="<img src=x onerror=window.ran=1>\u202e", planned_steps=2, probes=(RecordedProbe(key=key, thresholds={"mean": 0.0}),)
    )
    with RecordWriter(folder / "run", header, keep_texts=True, on_error="raise") as writer:
        writer.append(_row(place, text, key) for place, text in enumerate(CASES))
    with Review(folder / "run", cache=folder / "cache") as running:
        yield running


def _row(place, text, key):
    pieces = ["start ", text, " end"]
    completion = "".join(pieces)
    return RolloutRow(
        step=place % 2,
        rollout=f"{place}",
        prompt=f"{place} {text[:60]}",
        scores={key: {"frozen": {"mean": place / 100 - 1}, "policy": {"mean": 1 - place / 100}}},
        tokens=3,
        task_reward=float(place % 3 == 0),
        total_reward=0.0,
        policy_logprob=-1.0,
        text_sha256=hashlib.sha256(completion.encode("utf-8", "surrogatepass")).hexdigest(),
        prompt_text=text,
        completion_text=completion,
        completion_pieces=pieces,
        token_scores={key: {"frozen": [0.5, 1.0, -1.0], "policy": [0.1, -1.0, 0.3]}},
    )


def test_what_cannot_be_seen_is_spelt_out_as_in_the_terminal(window):
    seen = window()
    page = seen.open("#/0/overview")
    # those of no shape for Python may have got one in a newer Unicode
    numbers = [
        number
        for number in [*range(0x3000), *range(0xD7F0, 0x11000), *range(0xE0000, 0xE0200)]
        if unicodedata.category(chr(number)) != "Cn"
    ]
    spelt = page.evaluate(
        "async (all) => { const { visible } = await import('/static/text.js');"
        " return all.map((each) => visible(String.fromCodePoint(each))); }",
        numbers,
    )
    assert spelt == [visible(chr(number)) for number in numbers]


def nothing_ran(seen):
    page = seen.page
    assert page.evaluate("window.ran") is None
    assert (
        page.evaluate("document.querySelectorAll('main script, main iframe, main img, main style, main base, main meta, main math').length")
        == 0
    )
    assert page.evaluate("document.querySelectorAll('#content').length") == 1
    assert page.evaluate("getComputedStyle(document.body).display") == "block"
    foreign = (
        "[...document.querySelectorAll('a[href], form[action]')].filter((each) => (each.href ?? each.action).match(/^javascript|example/))"
    )
    assert page.evaluate(f"{foreign}.length") == 0
    assert page.url.startswith(f"http://{seen.host}/")


@pytest.mark.parametrize("width", [390, 1280])
def test_no_hostile_text_runs_or_breaks_a_view(window, width):
    seen = window(width, 900)
    for address in ("#/0/overview", "#/0/suspicious", "#/0/label?labeller=%3Cb%3Eann", "#/0/repair"):
        seen.open(address)
        nothing_ran(seen)
        assert seen.overflow() <= 0, address


def test_the_table_shows_every_hostile_text_on_a_line(window):
    seen = window()
    page = seen.open("#/0/rollouts?columns=step|name|prompt_id|task_reward")
    for _ in range(12):
        seen.until("!document.querySelector('.grid-row.waiting')")
        nothing_ran(seen)
        heights = page.evaluate("[...new Set([...document.querySelectorAll('.grid-row')].map((each) => each.offsetHeight))]")
        assert heights == [34]
        seen.press("PageDown")
    assert seen.overflow() <= 0


def test_each_of_200_hostile_rollouts_is_shown_as_what_it_is(window):
    seen = window(1000, 800)
    page = seen.open("#/0/overview")
    for place, text in enumerate(CASES):
        page.evaluate("hash => { location.hash = hash; }", f"#/0/rollout/{place % 2}:{urllib.parse.quote(str(place))}")
        seen.until(
            "name => document.querySelector('.view[data-view=rollout]:not([aria-busy]) .head .note')?.textContent.trim() === name",
            str(place),
        )
        nothing_ran(seen)
        assert seen.overflow() <= 0, repr(text[:80])
        shown = page.text_content(".tokens")
        for hidden, spelt in SEEN.items():
            assert hidden not in shown
            if hidden in text[:390]:
                assert spelt in shown, repr(text[:80])
        if "<" in text:
            assert text.strip() in shown
        assert len(shown) < 20_000, "a long token is cut"
        assert page.evaluate("document.querySelector('.tokens').offsetHeight") < 60_000


def test_all_of_a_token_of_a_million_letters_is_shown_when_it_is_asked_for(window):
    seen = window(1000, 800)
    place = CASES.index("A" * 1_000_000)
    page = seen.open(f"#/0/rollout/{place % 2}:{place}?way=frozen")
    page.locator(".tokens .more").click()
    assert len(page.text_content(".tokens")) > 1_000_000
    assert seen.overflow() <= 0
    nothing_ran(seen)
