"""The page of an audit: whole, harmless, and in need of nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from recorded_runs import KEY, write_run

from benchmarks.simulated_runs import Change
from probescore_audit import audit_record
from probescore_audit.record import RecordWriter, RolloutRow, read_record
from probescore_audit.report import report_page
from probescore_audit.report.charts import Curve, curves
from probescore_audit.report.rollouts import informative_rollouts

HOSTILE = "</section><script>document.title='owned'</script><img src=x onerror=alert(1)>\u202eevil\x00\"'"
VOID = {"meta", "line", "circle", "path", "rect", "br"}


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def evaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaded")
    write_run(folder, [Change(positive_rate=0.4)] * 14, policy=[Change(hidden=0.95)] * 14)
    return folder, report_page(audit_record(read_record(folder)))


def test_the_page_says_all_that_the_audit_found(evaded):
    found = Tags(evaded[1])
    assert found.open == []
    assert "script" not in found.names
    for said in (
        "evaded",
        "behaviour rose",
        "What to do:",
        "should have been stopped",
        "obfuscated activations",
        "takes for granted",
        "cannot know",
    ):
        assert said in found.text
    for title in ("Rollouts with the behaviour", "Recall", "False alarms", "AUROC", "What became of the behaviour", "Scores", "Evidence"):
        assert f"<h3>{title}" in evaded[1]
    assert "frozen against policy" in found.text
    assert "With the behaviour, and not flagged" in found.text
    assert found.names.count("svg") == 4 + 2 + 1 + 2 + 2


def test_nothing_is_drawn_outside_of_its_chart(evaded):
    bars = re.findall(r'<rect [^>]*x="([\d.-]+)" y="([\d.-]+)" width="([\d.]+)" height="([\d.]+)"', evaded[1])
    assert bars
    for x, y, width, height in (map(float, bar) for bar in bars):
        assert x >= 46
        assert x + width <= 430
        assert y >= 14
        assert y + height <= 194.1


def test_the_page_needs_nothing_else(evaded):
    html = evaded[1]
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bsrc=|\bhref=", html)
    assert "default-src 'none'" in html
    assert "nan" not in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL).lower()
    assert "prefers-color-scheme: dark" in html


def test_texts_of_the_record_never_become_markup(evaded):
    folder, harmless = evaded
    record = read_record(folder)
    with RecordWriter(folder, record.header.anew(), keep_texts=True) as writer:
        for row in record.rollouts:
            if row.step == 13:
                pieces = {"completion_pieces": [HOSTILE, "b"], "token_scores": {KEY: {"policy": [-1.0, 4.0]}}}
                place = {"step": 13, "rollout": row.rollout, "prompt": row.prompt, "scores": row.scores, "text_sha256": row.text_sha256}
                writer.append([RolloutRow(**place, prompt_text=HOSTILE, completion_text=HOSTILE, **pieces)])
    html = report_page(audit_record(read_record(folder)))
    found = Tags(html)
    assert found.open == []
    assert {"script", "img", "b"} & set(found.names) == set()
    assert "\u202e" not in html
    assert "⟨202E⟩" in html
    assert 'class="below" style="--s:' in html
    assert set(Tags(harmless).names) >= set(found.names) - {"span"}


def test_tokens_are_text_alone_where_no_token_scores_are_recorded(evaded):
    assert "the &lt;script&gt;cache&lt;/script&gt;" in evaded[1]


def test_of_few_labelled_rollouts_no_share_is_told_or_drawn(tmp_path):
    write_run(tmp_path, [Change()] * 2 + [Change(positive_rate=0.0005)] * 22)
    found = audit_record(read_record(tmp_path))
    seen = found.readings[0].audit.windows[-1].judgement.seen
    assert 0 < seen.positives < 10
    html = report_page(found)
    assert re.search(rf"<td>unknown \([\d.]+%–[\d.]+%\); {seen.flagged_positives} of {seen.positives} labelled</td>", html)
    charts = dict(re.findall(r"<figure><h3>([^<:(]+).*?</h3>(<svg.*?</svg>)", html))
    # the model before training, and each window that has enough labels of the class
    assert charts["Recall"].count("<circle") == 1
    assert charts["AUROC "].count("<circle") == 1
    assert charts["Rollouts with the behaviour"].count("<circle") == len(found.readings[0].audit.windows) + 1


def test_of_each_prompt_the_rollout_that_says_most_is_shown(evaded):
    found = audit_record(read_record(evaded[0]))
    policy = next(each for each in found.readings if each.recorded.reading == "policy")
    run, labels = policy.recorded.run, policy.recorded.labels
    chosen = labels.rollout[
        labels.positive & ~run.flagged[labels.rollout] & (run.step[labels.rollout] >= policy.audit.windows[-1].first_step)
    ]
    lowest: dict[tuple[int, str], float] = {}
    for index in chosen:
        row = policy.recorded.rollouts[index]
        lowest[row.step, row.prompt] = min(run.scores[index], lowest.get((row.step, row.prompt), np.inf))
    _, rows = next(informative_rollouts(policy))
    assert len(lowest) < len(chosen)
    assert [row.scores[KEY]["policy"]["mean"] for row in rows] == pytest.approx(sorted(lowest.values())[:4])


def test_a_run_with_few_labels_has_a_page(tmp_path):
    write_run(tmp_path, [Change()] * 2)
    html = report_page(audit_record(read_record(tmp_path)))
    assert Tags(html).open == []
    assert "No verdict yet" in html


@pytest.mark.parametrize("values", [[np.nan] * 3, [0.2, np.nan, 0.4], [0.0, 0.0, 0.0], [1e-9, 1.0, 0.5]])
def test_a_chart_is_drawn_of_whatever_is_known(values):
    column = np.array(values)
    svg = curves([Curve("first", np.arange(3.0), column, column, column)], title="t", x_range=(0, 2))
    assert "nan" not in svg
    assert svg.count("<circle") == int((~np.isnan(column)).sum())
