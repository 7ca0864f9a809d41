"""Two readings of a rollout, side by side or as their difference: on the page, on the terminal, and in lines of JSON."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from test_page import data_of, in_a_browser, read_in_browser
from views import INFO, answer, loaded_probe, probe_scores, scored_probe, threshold

from probescore import (
    Completion,
    CompletionScores,
    CompletionStatus,
    LoadedReading,
    Reading,
    ReadingKind,
    ReadingScores,
    Span,
    StreamedCompletion,
)
from probescore_server.cli.readings import loaded_table
from probescore_server.cli.report.page import page
from probescore_server.cli.report.terminal import print_rollouts
from probescore_server.cli.report.views import colour_scales, rollout_views, series_of
from probescore_server.cli.report.writers import InOrderWriter, JsonLinesWriter
from probescore_server.cli.rollout_lines import LabelledGroup
from probescore_server.cli.tables import reading_changes, readings_table

MODEL, POLICY_ID = INFO.model_fingerprint, "sha256:" + "ab" * 32
FROZEN = Reading("frozen", MODEL, ReadingKind.FROZEN, None, MODEL, golden_verified=True)
POLICY = Reading("policy", POLICY_ID, ReadingKind.ADAPTER, 150, MODEL, golden_verified=False, changed_layers=(0, 1, 2), unseen_tensors=4)
BOTH = (FROZEN, POLICY)
CHEATING = scored_probe()
LOADED = [loaded_probe(CHEATING, threshold(2.0))]
SERIES = series_of([CHEATING], LOADED, BOTH)
COMPLETION = Completion([7, 8], spans=(Span("tool", 1, 2),), id="x")


def read_twice(status: CompletionStatus = CompletionStatus.OK, completion: Completion = COMPLETION) -> CompletionScores:
    frozen = answer(completion, ["a", "b"], cheating=probe_scores([2.5, None], [3.0, 2.0]))
    scores = {"cheating": probe_scores([1.0, 0.5], [-1.0, 4.0])} if status is CompletionStatus.OK else {}
    return replace(frozen, readings={"policy": ReadingScores(status, scores, "" if scores else "NaN in block 1")})


def drawn(scored: CompletionScores, series=SERIES, readings=BOTH) -> str:
    return page(rollout_views("group 1", COMPLETION, scored, series), series, replace(INFO, readings=readings), title="one")


# ----------------------------------------------------------------------------------------------------------------------- views


def test_each_reading_and_the_difference_can_be_chosen():
    assert [(each.name, each.probe, each.reading, each.base) for each in SERIES] == [
        ("cheating · frozen", "cheating", "frozen", ""),
        ("cheating · policy", "cheating", "policy", ""),
        ("cheating · policy − frozen", "cheating", "policy", "frozen"),
    ]


@pytest.mark.parametrize("readings", [(), (FROZEN,)])
def test_without_another_reading_nothing_is_added(readings):
    (series,) = series_of([CHEATING], LOADED, readings)
    assert (series.name, series.reading, series.base) == ("cheating", "frozen", "")


def test_a_threshold_holds_for_the_frozen_reading_alone():
    assert [each.calibration is not None for each in SERIES] == [True, False, False]
    (view,) = rollout_views("group 1", COMPLETION, read_twice(), SERIES)
    assert [view.scores[each.name].flagged for each in SERIES] == [True, None, None]


def test_the_base_of_differences_is_frozen_or_else_the_first():
    other = replace(POLICY, name="other")
    assert [each.read for each in series_of([CHEATING], [], (POLICY, FROZEN))] == ["policy", "frozen", "policy − frozen"]
    assert [each.read for each in series_of([CHEATING], [], (other, POLICY))] == ["other", "policy", "policy − other"]
    assert [each.name for each in series_of([CHEATING], [], (POLICY,))] == ["cheating · policy"]


def test_a_difference_is_policy_minus_frozen():
    (view,) = rollout_views("group 1", COMPLETION, read_twice(), SERIES)
    difference = view.scores["cheating · policy − frozen"]

    assert difference.reduced == {"": (-1.5,), "tool": (None,)}
    np.testing.assert_array_equal(difference.tokens, [-4.0, 2.0])


def test_a_colour_means_one_score_on_all_readings():
    scales = colour_scales(SERIES, rollout_views("group 1", COMPLETION, read_twice(), SERIES))

    assert scales["cheating · frozen"] == scales["cheating · policy"]
    assert (scales["cheating · policy"].centre, scales["cheating · policy − frozen"].centre) == (2.0, 0.0)
    assert scales["cheating · policy"].reach == pytest.approx(3.0, rel=0.1)


def test_a_reading_without_scores_says_why_and_the_other_is_shown():
    (view,) = rollout_views("group 1", COMPLETION, read_twice(CompletionStatus.NON_FINITE), SERIES)

    assert (view.problem, view.unscored) == ("", {"policy": "NaN in block 1"})
    assert list(view.scores) == ["cheating · frozen"]
    broken = replace(
        read_twice(CompletionStatus.NON_FINITE), status=CompletionStatus.NON_FINITE, scores={}, status_message="NaN in block 0"
    )
    (view,) = rollout_views("group 1", COMPLETION, broken, SERIES)
    assert view.problem == "NaN in block 0; NaN in block 1"


# ---------------------------------------------------------------------------------------------------------------------- output


def test_the_page_has_every_number_of_every_reading():
    data = data_of(drawn(read_twice()))

    assert [(entry["name"], entry["reading"], entry["base"]) for entry in data["series"]] == [
        ("cheating", "frozen", ""),
        ("cheating", "policy", ""),
        ("cheating", "policy", "frozen"),
    ]
    assert [scores["tokens"] for scores in data["rollouts"][0]["scores"]] == [[3.0, 2.0], [-1.0, 4.0], [-4.0, 2.0]]
    assert data["readings"][1] == {"name": "policy", "id": POLICY_ID, "kind": "adapter", "step": 150}
    assert data_of(drawn(read_twice(CompletionStatus.NON_FINITE)))["rollouts"][0]["scores"][1:] == [None, None]


def test_the_terminal_prints_one_under_the_other_and_the_difference_with_a_sign():
    output = io.StringIO()
    views = rollout_views("group 1", COMPLETION, read_twice(), SERIES)
    views += rollout_views("group 2", COMPLETION, read_twice(CompletionStatus.NON_FINITE), SERIES)
    print_rollouts(Console(file=output, width=160), views, SERIES)

    lines = [line.rstrip() for line in output.getvalue().splitlines()]
    assert lines[2:8] == [
        "cheating · frozen  mean 2.500  tool: mean absent  ● flagged  threshold 2.000",
        "a[3.00]b[2.00]",
        "cheating · policy  mean 1.000  tool: mean 0.500",
        "a[-1.00]b[4.00]",
        "cheating · policy − frozen  mean -1.500  tool: mean absent",
        "a[-4.00]b[2.00]",
    ]
    assert "  not scored on policy: NaN in block 1" in lines


def test_lines_of_json_have_the_other_readings_apart(capsys):
    groups = [LabelledGroup([1, 2], [COMPLETION, COMPLETION], labels=(None, None))]
    writer = InOrderWriter(groups, [JsonLinesWriter()])
    info = replace(INFO, probes=(CHEATING,), readings=BOTH)
    writer.add(StreamedCompletion(0, 0, read_twice(), info))
    writer.add(StreamedCompletion(0, 1, read_twice(CompletionStatus.NON_FINITE), info))
    writer.close()

    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["scores"]["cheating"]["tokens"] == [[3.0], [2.0]]
    assert first["readings"]["frozen"] == {"id": MODEL, "kind": "frozen", "step": None}
    policy = first["readings"]["policy"]
    assert (policy["id"], policy["kind"], policy["step"], policy["status"]) == (POLICY_ID, "adapter", 150, "ok")
    assert policy["scores"]["cheating"]["tokens"] == [[-1.0], [4.0]]
    assert second["scores"]["cheating"]["tokens"] == [[3.0], [2.0]]
    assert (second["readings"]["policy"]["status"], second["readings"]["policy"]["scores"]) == ("non_finite", {})
    assert writer.unscored == 1


def test_lines_of_json_without_readings_are_as_they_were(capsys):
    writer = InOrderWriter([LabelledGroup([1, 2], [COMPLETION], labels=(None,))], [JsonLinesWriter()])
    writer.add(StreamedCompletion(0, 0, answer(COMPLETION, None, cheating=probe_scores([1, 1], [1, 1])), replace(INFO, probes=(CHEATING,))))
    assert "readings" not in json.loads(capsys.readouterr().out)


# ---------------------------------------------------------------------------------------------------------------------- tables


def table_text(table) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_a_table_says_what_each_reading_changes():
    shown = table_text(readings_table(BOTH)).splitlines()
    assert shown[2].split() == ["frozen", "frozen", "nothing", MODEL]
    assert shown[3].split() == [
        "policy",
        "adapter",
        "150",
        *["blocks", "0", "to", "2;", "4", "tensors", "are", "seen", "by", "no", "probe"],
        POLICY_ID,
    ]
    assert "readings_root is off" in table_text(readings_table(()))
    assert reading_changes(replace(POLICY, changed_layers=(), unseen_tensors=0)) == "nothing that a probe sees"
    assert reading_changes(replace(POLICY, changed_layers=(1, 5), unseen_tensors=0)) == "blocks 1, 5"
    assert reading_changes(replace(POLICY, changed_layers=(1,), unseen_tensors=0)) == "block 1"


def test_a_loaded_reading_says_what_it_replaced_and_how_far_it_moves_scores():
    shown = table_text(loaded_table(LoadedReading(POLICY, None, {"cheating@1": 0.123456}, 4096)))
    assert "policy is loaded" in shown
    assert "nothing" in shown
    assert "4,096 bytes" in shown
    assert "golden drift of cheating@1" in shown
    assert "0.123 standard deviations" in shown


# ------------------------------------------------------------------------------------------------------------------ in a browser

DRIVER = """
<script>
const seen = {};
const panes = () => [...document.querySelectorAll("article:first-child .pane")];
const texts = (selector) => panes().map((pane) => pane.querySelector(selector)).filter((box) => !box.hidden).map((box) => box.textContent);
const sides_of = (colour) => colour.includes("--above") ? "above" : colour.includes("--below") ? "below" : "";
const colours = () => panes().map((pane) => [...pane.querySelectorAll(".token")].map((token) => sides_of(token.style.backgroundColor)));
function choose(id, value) { byId(id).value = value; byId(id).dispatchEvent(new Event("change")); }
data.rollouts.forEach(draw);
seen.choices = [...byId("reading").options].map((option) => option.value);
seen.offered = !byId("read").hidden;
seen.heads = texts("h3");
seen.facts = texts(".facts");
seen.colours = colours();
const second = panes()[1].querySelectorAll(".token")[0];
second.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, clientX: 5, clientY: 5 }));
seen.tip = byId("tip").textContent;
choose("reading", "policy");
seen.policyFacts = document.querySelector("article .facts").textContent;
seen.policyFlag = byId("only").hidden;
choose("reading", "policy − frozen");
seen.differenceFacts = document.querySelector("article .facts").textContent;
seen.differenceColours = colours();
seen.legend = byId("middle").textContent;
seen.list = [...document.querySelectorAll("nav .number")].map((number) => number.textContent);
seen.unscored = document.querySelector("article:nth-child(2) .problem").textContent;
seen.origin = byId("origin").textContent;
document.body.setAttribute("data-seen", JSON.stringify(seen));
</script>
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    views = rollout_views("group 1", COMPLETION, read_twice(), SERIES)
    views += rollout_views("group 2", COMPLETION, read_twice(CompletionStatus.NON_FINITE), SERIES)
    file = tmp_path_factory.mktemp("page") / "page.html"
    html = page(views, SERIES, replace(INFO, readings=BOTH), title="two")
    file.write_text(html.replace("</body>", DRIVER + "</body>"), encoding="utf-8")
    return read_in_browser(file)


@in_a_browser
def test_the_page_begins_with_both_side_by_side(seen):
    assert seen["offered"]
    assert seen["choices"] == ["side by side", "frozen", "policy", "policy − frozen"]
    assert seen["heads"] == ["frozen", "policy"]
    assert "mean 2.50" in seen["facts"][0]
    assert "flagged" in seen["facts"][0]
    assert "mean 1.00" in seen["facts"][1]
    assert "flagged" not in seen["facts"][1]
    assert seen["colours"] == [["above", ""], ["below", "above"]]
    assert f"policy: adapter of step 150, {POLICY_ID}" in seen["origin"]


@in_a_browser
def test_the_pointer_shows_the_number_on_each_reading(seen):
    assert seen["tip"].startswith("-1.00frozen 3.00policy -1.00policy − frozen -4.00")


@in_a_browser
def test_one_reading_or_the_difference_can_be_chosen(seen):
    assert "mean 1.00" in seen["policyFacts"]
    assert seen["policyFlag"]
    assert "mean -1.50" in seen["differenceFacts"]
    assert seen["differenceColours"] == [["below", "above"]]
    assert seen["legend"] == "logit, policy − frozen; colours meet at 0"
    assert seen["list"] == ["-1.50", "–"]
    assert seen["unscored"] == "not scored on policy: NaN in block 1"
