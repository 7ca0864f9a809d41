"""The table of rollouts in a real browser: it reads the rows that it shows, and everything that chooses them has an address."""

from __future__ import annotations

import urllib.parse

from reviewed import Review

from probescore_audit.record import RecordedProbe, RecordWriter, RolloutRow, RunHeader


def rows_of(seen):
    seen.until(
        "document.querySelector('.grid-row') && !document.querySelector('.grid-row.waiting') && !document.querySelector('.grid[aria-busy]')"
    )
    rows = seen.page.evaluate(
        "[...document.querySelectorAll('.grid-row')].map((row) => [Number(row.dataset.index), row.innerText.split('\\n')])"
    )
    return [cells for _, cells in sorted(rows)]


def pages_asked(window):
    asked = [urllib.parse.parse_qs(urllib.parse.urlsplit(each).query) for each in window.asked if "/rollouts?" in each]
    return [(int(each["offset"][0]), int(each["limit"][0])) for each in asked]


def test_the_table_reads_and_draws_what_it_shows(window):
    seen = window()
    page = seen.open("#/0/rollouts")
    rows_of(seen)
    assert pages_asked(seen) == [(0, 100)]

    seen.press("End")
    last = rows_of(seen)[-1]
    assert last[0] == "19"
    assert sum(limit for _, limit in pages_asked(seen)) <= 300
    assert page.locator(".grid-row").count() < 80, "of 4,000"
    assert page.get_attribute(".grid", "aria-rowcount") == "4001"
    assert page.get_attribute(".grid-row[aria-selected=true]", "aria-rowindex") == "4001"
    assert page.get_attribute(".grid", "aria-activedescendant") == page.get_attribute(".grid-row[aria-selected=true]", "id")

    page.reload()
    seen.settled()
    rows_of(seen)
    assert page.get_attribute(".grid-row[aria-selected=true]", "aria-rowindex") == "4001", "the address keeps the place"
    seen.press("Home", "j", "j", "k")
    assert page.get_attribute(".grid-row[aria-selected=true]", "aria-rowindex") == "3"


def test_flying_over_the_rows_does_not_read_them_all(window):
    seen = window()
    page = seen.open("#/0/rollouts")
    rows_of(seen)

    page.evaluate(
        "new Promise((done) => { const grid = document.querySelector('.grid'); let at = 0;"
        " const step = () => { grid.scrollTop = at += 4000; at < grid.scrollHeight ? requestAnimationFrame(step) : done(); }; step(); })"
    )
    rows_of(seen)

    assert len(pages_asked(seen)) < 15, "of 40"


def test_sorting_filtering_and_searching_ask_the_server_and_keep_the_address(window, review):
    seen = window()
    page = seen.open("#/0/rollouts")
    rows_of(seen)

    page.click(".grid-head button:has-text('cheating@1')")
    top = review.get("/api/runs/0/rollouts", sort="score:cheating@1:frozen", descending=1, limit=3)["rows"]
    assert [cells[1] for cells in rows_of(seen)[:3]] == [f"{row['score:cheating@1:frozen']:.2f}" for row in top]
    assert page.locator(".grid-head [aria-sort=descending]").count() == 1

    seen.press("f")
    page.select_option(".filter select >> nth=0", "task_reward")
    page.select_option(".filter select >> nth=1", ">=")
    page.fill(".filter input", "1")
    seen.press("Enter")
    page.wait_for_selector(".chips li")
    where = [["task_reward", ">=", 1]]
    total = review.get("/api/runs/0/rollouts", where=where, limit=1)["total"]
    seen.until("wanted => document.querySelector('.total').textContent.startsWith(wanted)", f"{total:,} of ")

    seen.press("Escape", "/")
    page.keyboard.type("cache")
    found = review.get("/api/runs/0/rollouts", where=where, q="cache", limit=1)["total"]
    assert 0 < found < total
    seen.until("wanted => document.querySelector('.total').textContent.startsWith(wanted)", f"{found:,} of ")

    page.reload()
    seen.settled()
    assert page.inner_text(".total").startswith(f"{found:,} of ")
    assert page.input_value("input[type=search]") == "cache"
    hrefs = page.eval_on_selector_all(".menu-body a[download]", "links => links.map((each) => each.getAttribute('href'))")
    for name, href in zip(("jsonl", "parquet", "html"), hrefs, strict=True):
        asked = urllib.parse.parse_qs(urllib.parse.urlsplit(href).query)
        assert (asked["format"], asked["q"], asked["sort"]) == ([name], ["cache"], ["score:cheating@1:frozen"])

    page.click(".chips button")
    seen.until("document.querySelectorAll('.chips li').length === 0")


def test_a_view_is_saved_chosen_again_and_deleted(window, review):
    seen = window()
    page = seen.open("#/0/rollouts")
    rows_of(seen)
    page.click(".grid-head button:has-text('task reward')")
    rows_of(seen)

    seen.press("s")
    page.keyboard.type('My view <b>&"')
    seen.press("Enter")
    seen.until("[...document.querySelectorAll('.controls select option')].some((each) => each.textContent.includes('My view'))")
    saved = [view for view in review.get("/api/runs/0/columns")["views"] if not view["built_in"]]
    assert [(view["title"], view["sort"], view["descending"]) for view in saved] == [('My view <b>&"', "task_reward", True)]

    page = seen.open(f"#/0/rollouts?view={saved[0]['id']}")
    rows_of(seen)
    assert page.input_value(".controls select") == saved[0]["id"]
    assert page.locator(".grid-head [aria-sort=descending]").inner_text().startswith("task reward")
    seen.press("s")
    page.click("button:has-text('Delete')")
    seen.until("![...document.querySelectorAll('.controls select option')].some((each) => each.textContent.includes('My view'))")
    assert all(view["built_in"] for view in review.get("/api/runs/0/columns")["views"])


def test_a_rollout_opens_from_the_table_and_leads_on_in_its_order_and_back(window, review):
    seen = window()
    page = seen.open("#/0/rollouts?view=high-score")
    rows_of(seen)
    order = [row["rollout"] for row in review.get("/api/runs/0/rollouts", view="high-score", limit=4)["rows"]]

    seen.press("j", "Enter")
    page.wait_for_selector(".view[data-view=rollout]:not([aria-busy])")
    assert urllib.parse.quote(order[1], safe="") in page.url
    seen.press("j")
    seen.until("name => location.hash.includes(name)", urllib.parse.quote(order[2], safe=""))
    seen.settled()

    page.go_back()
    page.wait_for_selector(".view[data-view=rollouts]:not([aria-busy])")
    rows_of(seen)
    assert page.get_attribute(".grid-row[aria-selected=true]", "aria-rowindex") == "3"
    page.locator(".grid-row .number").first.click()
    page.wait_for_selector(".view[data-view=rollout]")


def test_a_search_that_finds_nothing_says_so(window):
    seen = window(390, 844)
    page = seen.open("#/0/rollouts?q=zzzzzz")
    assert "No rollout matches." in page.inner_text("#content")


def test_rollouts_that_come_while_one_looks_are_offered(window, chromium, tmp_path):
    header = RunHeader(run_id="goes-on", planned_steps=9, probes=(RecordedProbe(key="p@1", thresholds={"mean": 1.0}),))

    def rows(step):
        return [RolloutRow(step=step, rollout=str(place), prompt="a", scores={"p@1": {"frozen": {"mean": 0.5}}}) for place in range(8)]

    with RecordWriter(tmp_path / "run", header, keep_texts=False, on_error="raise") as writer:
        writer.append(rows(0))
        with Review(tmp_path / "run", cache=tmp_path / "cache") as running:
            seen = window(host=running.host)
            page = seen.open("#/0/rollouts")
            assert len(rows_of(seen)) == 8
            writer.append(rows(1))
            seen.until("dispatchEvent(new Event('focus')), document.querySelector('.controls').innerText.includes('Show 8 new')")
            seen.press("g")
            seen.until("document.querySelector('.total').textContent === '16 rollouts'")
            assert len(rows_of(seen)) == 16
            assert page.locator(".controls button:has-text('new')").is_hidden()


def test_a_key_that_is_held_down_moves_on_and_the_address_follows(window):
    seen = window()
    page = seen.open("#/0/rollouts")
    rows_of(seen)
    for _ in range(260):  # more than browsers let a page change its address in half a minute
        page.keyboard.down("j")
    page.keyboard.up("j")
    seen.until("document.querySelector('.grid-row[aria-selected=true]')?.getAttribute('aria-rowindex') === '262'")
    seen.until("location.hash.includes('at=260')")
