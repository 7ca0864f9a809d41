"""What a notebook shows of results and records."""

from __future__ import annotations

import numpy as np
from made_run import KEY, made_run

from probescore.types import CompletionScores, CompletionStatus, ProbeScores, ReadingScores
from probescore_audit.record import RolloutRow, read_record


def test_a_scored_completion_shows_its_tokens_coloured():
    tokens = np.array([[1.0], [np.nan], [-2.0]], np.float32)
    scores = {"cheating": ProbeScores(np.full((1, 1, 1), 0.5, np.float32), tokens)}
    policy = ReadingScores(CompletionStatus.OK, {"cheating": ProbeScores(np.full((1, 1, 1), np.nan, np.float32))})
    shown = CompletionScores(
        "a", CompletionStatus.OK, scores, completion_texts=("<b>", "\x1b", "c"), readings={"policy": policy}
    )._repr_html_()

    assert "&lt;b&gt;" in shown
    assert "⟨1B⟩" in shown
    assert "<b>" not in shown
    assert shown.count("<span") == 2, "a token without a score has no colour"
    assert 'title="1"' in shown
    assert "policy" in shown
    assert "non_finite" in CompletionScores("a", CompletionStatus.NON_FINITE, {})._repr_html_()


def test_a_record_its_table_and_its_rollouts_show_themselves(tmp_path):
    made_run(tmp_path / "run", 80, 2)
    record = read_record(tmp_path / "run")

    assert "made-80" in record._repr_html_()
    table = record.table()._repr_html_()
    assert table.count("<tr>") == 21
    assert "80 rollouts" in table
    rollout = record.rollouts[0]._repr_html_()
    assert f"{KEY} on policy" in rollout
    assert rollout.count("<span") == 80
    hostile = RolloutRow(step=0, rollout="<i>", prompt="p", scores={}, prompt_text="<script>", completion_text="\u202e</pre>")._repr_html_()
    for markup in ("<script", "<i>", "\u202e", "</pre></pre>"):
        assert markup not in hostile
