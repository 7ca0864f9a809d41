"""Repair in a real browser, and every key of every view."""

from __future__ import annotations

import pytest
from test_views import VIEWS


def test_an_audit_runs_as_the_command_that_is_shown_and_survives_a_reload(window, review):
    seen = window()
    page = seen.open("#/1/repair")
    steps = review.get("/api/runs/1/repair")["steps"]
    assert page.locator(".steps > li").count() == len(steps)
    for place, step in enumerate(steps):
        assert page.locator(".steps > li").nth(place).locator("button[type=submit]").is_enabled() == step["ready"]

    seen.press("j", "Enter")
    seen.until("document.querySelector('.job .badge') !== null")
    page.reload()
    seen.settled()
    seen.until("document.querySelector('.job .badge.done, .job .badge.failed') !== null", seconds=120)

    assert page.inner_text(".job .badge") == "done"
    assert page.inner_text(".command").startswith("probescore audit ")
    told = review.get("/api/runs/1/overview")["verdicts"]
    shown = page.inner_text(".job .result")
    assert all(each["sentence"] in shown for each in told)


@pytest.mark.parametrize("address", VIEWS)
def test_every_key_of_a_view_does_something_without_a_fault(window, address):
    seen = window()
    page = seen.open(address)
    seen.press("?")
    keys = page.evaluate("[...document.querySelectorAll('#help section:first-child kbd')].map((each) => each.textContent)")
    seen.press("Escape")
    names = {"↓": "ArrowDown", "↑": "ArrowUp", "←": "ArrowLeft", "→": "ArrowRight", "Page ↓": "PageDown", "Page ↑": "PageUp", "Space": " "}
    assert len(keys) >= 2
    for key in keys:
        seen.press(names.get(key, key))
        page.wait_for_timeout(60)
        seen.press("Escape")
        if f"/{address.split('/')[2].partition('?')[0]}" not in page.url:
            seen.open(address)  # the key led to another view
    seen.settled()
    assert "cannot be shown" not in page.inner_text("#content")
