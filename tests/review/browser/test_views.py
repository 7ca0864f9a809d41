"""Every view of the review in a real browser: it shows what it should, in any window, with the pointer and with keys alone."""

from __future__ import annotations

import json
import os
import urllib.parse
from pathlib import Path

import pytest
from reviewed import Review
from test_scored_files import scored

VIEWS = [
    "#/0/overview?beside=1",
    "#/0/rollouts?view=high-score",
    "#/0/suspicious",
    "#/0/rollout/19:0.1",
    "#/0/label?labeller=ann",
    "#/0/repair",
]
AXE = os.environ.get("PROBESCORE_AXE")


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light"), (1600, "dark")])
def test_every_view_fits_its_window(window, width, scheme):
    seen = window(width, 844, scheme)
    for address in VIEWS:
        page = seen.open(address)
        assert page.inner_text("#content").strip()
        assert "cannot be shown" not in page.inner_text("#content")
        assert seen.overflow() <= 0, address
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert colour == ("rgb(19, 19, 22)" if scheme == "dark" else "rgb(246, 246, 244)")


def test_the_number_keys_go_to_the_views_and_the_help_lists_every_key(window):
    seen = window()
    page = seen.open("#/0/overview")
    for key, name in zip("23451", ("rollouts", "suspicious", "label", "repair", "overview"), strict=True):
        seen.press(key)
        seen.until("name => document.querySelector(`.view[data-view=${name}]:not([aria-busy])`)", name)
        seen.press("Escape", "?")
        listed = page.inner_text("#help")
        assert "In every view" in listed
        assert "Show these keys" in listed
        seen.press("Escape")
        seen.until("!document.getElementById('help').open")


def test_keys_of_one_letter_can_be_turned_off(window):
    seen = window()
    page = seen.open("#/0/rollouts")
    seen.press("?")
    page.click("#help input")
    seen.press("Escape")

    seen.press("1")
    page.wait_for_timeout(200)

    assert page.locator(".view[data-view=rollouts]").count() == 1, "the keys are off, also after a reload"
    page.reload()
    seen.settled()
    seen.press("1")
    page.wait_for_timeout(200)
    assert page.locator(".view[data-view=rollouts]").count() == 1


def test_a_point_of_a_plot_leads_to_its_rollouts(window):
    seen = window()
    page = seen.open("#/0/overview")

    seen.press("v", "v", "ArrowRight", "ArrowRight")
    said = page.inner_text(".plot:focus ~ .readout")
    seen.press("Enter")
    page.wait_for_selector(".view[data-view=rollouts]:not([aria-busy])")

    assert said.startswith("step 2 ")
    assert page.inner_text(".chips li span") == "step = 2"
    assert page.inner_text(".total") == "200 of 4,000 rollouts"
    assert {row.split("\n")[0] for row in page.locator(".grid-row").all_inner_texts()[:5]} == {"2"}

    page.go_back()
    seen.settled()
    plot = page.locator(".plot").nth(1)
    plot.hover()
    assert page.locator(".plot").nth(1).locator("~ .readout").inner_text().startswith("step ")
    plot.click()
    page.wait_for_selector(".view[data-view=rollouts]")


def test_several_runs_stand_side_by_side_and_the_address_keeps_it(window):
    seen = window()
    page = seen.open("#/0/overview")
    alone = page.locator(".plot").count()

    page.check(".beside input")
    seen.until("before => document.querySelectorAll('.plot').length > before", alone)
    page.reload()
    seen.settled()

    assert page.locator(".column").count() == 2
    assert page.locator(".plot").count() > alone
    page.locator("figure details").first.locator("summary").click()
    assert page.locator("figure details table").first.inner_text().startswith("step")


def test_suspicious_says_why_and_leads_to_the_rollout_and_back(window, review):
    lists = review.get("/api/runs/0/suspicious")["lists"]
    seen = window()
    page = seen.open("#/0/suspicious")

    for listed in lists:
        assert page.inner_text("#list .why >> nth=0") == listed["why"]
        if listed["rows"]:
            assert listed["rows"][0]["why"] in page.inner_text(".finding >> nth=0")
        seen.press("]")
    seen.press("j", "j", "Enter")
    page.wait_for_selector(".view[data-view=rollout]:not([aria-busy])")
    assert urllib.parse.quote(lists[0]["rows"][1]["rollout"], safe="") in page.url

    seen.press("j")
    seen.until("name => location.hash.includes(name)", urllib.parse.quote(lists[0]["rows"][2]["rollout"], safe=""))
    seen.settled()
    seen.press("b")
    page.wait_for_selector(".view[data-view=suspicious]:not([aria-busy])")
    assert page.evaluate("document.activeElement.closest('.finding') !== null")


def test_tokens_have_the_colours_and_numbers_of_any_probe_and_reading(window, review):
    told = review.get("/api/runs/0/rollouts/19%3A0.1")
    seen = window()
    page = seen.open("#/0/rollout/19%3A0.1")
    panes = page.locator(".pane")
    assert [text.split("\n")[0].split("≤")[0].strip() for text in panes.locator("h3").all_inner_texts()] == ["frozen", "policy"]
    assert panes.nth(0).locator(".token").count() == len(told["tokens"])

    page.locator(".pane >> nth=1").locator(".token >> nth=3").hover()
    tip = page.inner_text("#tip")
    scores = told["tokens"][3]["scores"]
    shown = [f"{scores[name]:.3g}".replace("-", "−")[:5] for name in ("cheating@1:policy", "cheating@1:frozen")]
    assert tip.startswith(shown[0][:4])
    assert shown[1][:4] in tip
    assert "token 4 of 40" in tip
    assert page.locator(".token.held").count() == 2, "the same token in both panes"

    seen.press("r", "r", "r")
    assert page.locator(".pane").count() == 1
    assert "policy − frozen" in page.inner_text(".pane h3")
    strengths = page.evaluate(
        "[...document.querySelectorAll('.token')].map((each) => [each.className.includes('below'), each.style.getPropertyValue('--s')])"
    )
    differences = [token["scores"]["cheating@1:policy"] - token["scores"]["cheating@1:frozen"] for token in told["tokens"]]
    assert [below for below, strength in strengths if strength] == [
        number < 0 for number, (_, strength) in zip(differences, strengths, strict=True) if strength
    ]

    seen.press("t", "ArrowRight", "ArrowRight", "ArrowRight")
    assert "token 3 of 40" in page.inner_text("#tip")
    page.reload()
    seen.settled()
    assert "policy − frozen" in page.inner_text(".pane h3"), "the address keeps the reading"
    assert page.locator("aside .others li").count() >= 8, "the group"
    assert page.locator("aside .others a[aria-current]").count() == 1


def test_an_address_that_leads_nowhere_says_so(window):
    seen = window()
    page = seen.open("#/0/rollout/nothing")
    assert "an id is step:name" in page.inner_text("#content")
    page = seen.open("#/7/none")
    assert page.locator(".view[data-view=overview]").count() == 1


@pytest.mark.skipif(not AXE, reason="PROBESCORE_AXE does not name axe.min.js of axe-core")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_axe_finds_no_serious_fault(window, width, scheme):
    rules = Path(str(AXE)).read_text(encoding="utf-8")
    seen = window(width, 844, scheme)
    for address in [*VIEWS, "#/0/label"]:
        page = seen.open(address)
        page.evaluate(rules)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        serious = [each for each in found if each["impact"] in ("serious", "critical")]
        assert not serious, json.dumps(serious, indent=1)[:4000]


def test_a_file_of_scored_rollouts_is_shown_with_follow_ups_and_what_failed(window, tmp_path):
    path = tmp_path / "scored.jsonl"
    path.write_text(scored(0, 0, 3.0, label=True) + scored(0, 1, -1.0) + scored(1, 0, 0.5, status="failed", scores={}, readings={}))
    with Review(path, "--threshold", "cheating@1=1", cache=tmp_path / "cache") as running:
        seen = window(host=running.host)
        page = seen.open("#/0/rollouts?view=high-score")
        seen.until("document.querySelectorAll('.grid-row:not(.waiting)').length === 3")
        order = [row["rollout"] for row in running.get("/api/runs/0/rollouts", view="high-score")["rows"]]
        assert page.locator(".grid-row .flagged").count() >= 1
        page = seen.open(f"#/0/rollout/{urllib.parse.quote(order[0], safe='')}")
        follow = page.locator(".follow-ups")
        assert "Honest?" in follow.inner_text()
        assert follow.locator(".token").count() >= 1
        assert page.locator(".badge.yes").count() >= 1
        for name in order[1:]:
            page = seen.open(f"#/0/rollout/{urllib.parse.quote(name, safe='')}")
            assert "completion" in page.inner_text("#content")


@pytest.mark.parametrize(
    ("address", "button"), [("#/0/overview", ".column"), ("#/0/suspicious", "#list"), ("#/0/rollout/19:0.1", ".controls")]
)
def test_what_a_view_shows_is_exported_as_lines_of_json(window, address, button):
    seen = window()
    page = seen.open(address)
    with page.expect_download() as waited:
        page.click(f"{button} button:has-text('Export')")
    by_button = Path(waited.value.path()).read_text(encoding="utf-8")
    with page.expect_download() as waited:
        seen.press("Escape", "x")
    assert Path(waited.value.path()).read_text(encoding="utf-8") == by_button
    assert waited.value.suggested_filename.endswith(".jsonl")
    rows = [json.loads(line) for line in by_button.splitlines()]
    assert len(rows) == (50 if "suspicious" in address else 1)
    assert all("why" in row for row in rows) == ("suspicious" in address)
