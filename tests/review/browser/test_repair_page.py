"""Repair in a real browser, and every key of every view."""

from __future__ import annotations

import pytest
from reviewed import Review
from test_repair import model, probes, run  # noqa: F401 - fixtures: a record with labels, a model, and a probe that sees little of them
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


@pytest.mark.slow
def test_a_probe_is_repaired_by_keys_from_labels_to_its_replacement(window, model, probes, run, tmp_path):  # noqa: F811
    with Review(run, "--model", str(model), "--probes", str(probes), cache=tmp_path / "cache") as running:
        seen = window(1280, 1000, host=running.host)
        page = seen.open("#/0/repair")
        places = {step["step"]: place for place, step in enumerate(running.get("/api/runs/0/repair")["steps"])}

        def done(step, state="done"):
            card = page.locator(".steps > li").nth(places[step])
            card.locator("button[type=submit]").focus()
            seen.press("Enter")
            card.locator(".badge.done, .badge.failed").wait_for(timeout=180_000)
            assert card.locator(".job > .state").inner_text() == state, card.inner_text()
            return card

        failed = done("audit", "failed")
        assert "reference" in failed.locator(".output").inner_text()

        page.fill("#recalibrate-false_positive_rate", "0.2")
        card = done("recalibrate")
        job = next(each for each in running.get("/api/runs/0/jobs")["jobs"] if each["step"] == "recalibrate")
        told = running.get(f"/api/jobs/{job['job']}")["result"]
        cells = card.locator(".beside-table tbody tr").all_inner_texts()
        assert [cell.split("\t")[1:] for cell in cells if cell.startswith("flagged")] == [
            [str(told[side]["flagged"]) for side in ("old", "new")]
        ]
        assert told["sentence"] in card.inner_text()
        assert card.locator(".others li").count() == len(told["differently"])
        assert "--false-positive-rate 0.2" in card.locator(".command").inner_text()
        page.wait_for_selector("#discard-new option:has-text('cheating@2')", state="attached")
        done("discard")

        page.select_option("#refit-kind", "difference-of-means")
        assert "--kind difference-of-means" in done("refit").locator(".command").inner_text()
        compared = done("compare").locator(".beside-table").inner_text()
        auroc = next(line for line in compared.splitlines() if line.startswith("AUROC"))
        old, new = (float(cell.split()[0]) for cell in auroc.split("\t")[1:])
        assert new > old
        done("replace")
        assert (probes / "cheating-2.onnx").exists()

        text = page.inner_text(".steps")
        page.reload()
        seen.settled()
        seen.until("document.querySelectorAll('.job > .state').length === 6")
        for step in ("recalibrate", "refit", "compare", "replace"):
            sentence = page.locator(".steps > li").nth(places[step]).locator(".sentence")
            if sentence.count():
                assert sentence.inner_text() in text, "what came out is still there"
        assert seen.overflow() <= 0
        page.screenshot(path=tmp_path / "repair.png", full_page=True)
