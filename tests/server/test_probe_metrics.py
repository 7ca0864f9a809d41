"""What scrapes show of the probes, counted from results as workers send them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from probescore import Reduction
from probescore.types import (
    Calibration,
    CompletionScores,
    CompletionStatus,
    ModelInfo,
    OutputPer,
    ProbeInfo,
    ProbeScores,
    Scope,
    ScoreUnit,
    Usage,
)
from probescore_server.front.probe_metrics import MAX_DISTRIBUTIONS, SCORES, ProbeMetrics
from probescore_server.rollouts import EngineInfo, ResolvedOptions, RolloutResult

MEAN, MAX = Reduction.parse("mean"), Reduction.parse("max")
ASKED = ResolvedOptions(probes=("cheating@1",))
LABELS = {"probe": "cheating", "version": "1", "reduction": "mean", "label": "cheats"}


def calibration(threshold: float, reduction: Reduction | None = None) -> Calibration:
    return Calibration(threshold, 0.05, 0.01, 0.1, 100, "a data set", reduction)


PROBE = ProbeInfo(
    name="cheating",
    version="1",
    description="",
    graph_sha256="a" * 64,
    manifest_sha256="b" * 64,
    taps=(),
    unit=ScoreUnit.LOGIT,
    output_per=OutputPer.TOKEN,
    labels=("cheats",),
    default_reduction=MEAN,
    calibrations=(calibration(2.0),),
    accepted_mismatches=(),
    manifest_json="{}",
)
MODEL = ModelInfo("model", "", "fingerprint", "llama", 8, 2, 2, 96, 0)


def loaded(*probes: ProbeInfo) -> EngineInfo:
    return EngineInfo(MODEL, "", None, probes, "cpu", "float32", "universal")


def result(*numbers: float) -> RolloutResult:
    """A rollout with these reductions of the probe's one label."""
    reduced = np.array(numbers, np.float32).reshape(1, -1, 1)
    return RolloutResult(CompletionScores("", CompletionStatus.OK, {"cheating": ProbeScores(reduced)}), Usage())


class Shown:
    """Metrics of an engine, after some calls."""

    def __init__(self, info: EngineInfo) -> None:
        self.registry = CollectorRegistry()
        self.metrics = ProbeMetrics(self.registry)
        self.info = info
        self.metrics.show_probes(info)

    def count(self, *results: RolloutResult, options: ResolvedOptions = ASKED) -> Shown:
        self.metrics.count_results(self.info.scored_probes(options), options.scope, results)
        return self

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"probescore_probe_{name}", {**LABELS, **labels})


def test_series_are_there_before_the_first_call() -> None:
    shown = Shown(loaded(PROBE))
    assert (shown.value("score_count"), shown.value("flagged_total"), shown.value("threshold")) == (0, 0, 2.0)


def test_a_score_at_the_threshold_is_flagged_and_one_below_is_not() -> None:
    shown = Shown(loaded(PROBE)).count(result(2.0), result(1.99), result(5.0))
    assert (shown.value("flagged_total"), shown.value("score_count")) == (2, 3)


def test_a_score_stands_in_the_first_bucket_that_holds_it() -> None:
    shown = Shown(loaded(PROBE)).count(result(0.5))
    assert (shown.value("score_bucket", le="0.4"), shown.value("score_bucket", le="0.5"), shown.value("score_bucket", le="+Inf")) == (
        0,
        1,
        1,
    )


@given(st.lists(st.floats(-1000, 1000, width=32), max_size=20), st.lists(st.floats(-1000, 1000, width=32), max_size=20))
def test_the_histogram_is_the_one_that_prometheus_client_would_count(first: list[float], second: list[float]) -> None:
    shown = Shown(loaded(PROBE)).count(*map(result, first)).count(*map(result, second))
    histogram = Histogram("probescore_probe_score", "As theirs.", buckets=SCORES, registry=None)
    for score in first + second:
        histogram.observe(score)
    (family,) = histogram.collect()
    theirs = {sample.labels["le"]: sample.value for sample in family.samples if sample.name.endswith("_bucket")}
    assert {bound: shown.value("score_bucket", le=bound) for bound in theirs} == theirs
    assert shown.value("score_sum") == pytest.approx(sum(first + second), rel=1e-6, abs=1e-3)


def test_an_empty_selection_is_not_a_score() -> None:
    assert Shown(loaded(PROBE)).count(result(float("nan"))).value("score_count") == 0


def test_scores_under_a_reduction_that_the_manifest_does_not_name_are_left_out() -> None:
    options = replace(ASKED, reductions=(MAX,))
    shown = Shown(loaded(PROBE)).count(result(9.0), options=options)
    assert shown.value("score_count") == 0
    assert shown.value("score_count", reduction="max") is None


def test_each_reduction_of_a_calibration_has_its_own_distribution_and_threshold() -> None:
    probe = replace(PROBE, calibrations=(calibration(2.0), calibration(4.0, MAX)))
    shown = Shown(loaded(probe)).count(result(3.0, 3.5), options=replace(ASKED, reductions=(MEAN, MAX)))
    assert (shown.value("score_sum"), shown.value("score_sum", reduction="max")) == (3.0, 3.5)
    assert (shown.value("flagged_total"), shown.value("flagged_total", reduction="max")) == (1, 0)


def test_without_a_calibration_nothing_is_compared() -> None:
    shown = Shown(loaded(replace(PROBE, calibrations=()))).count(result(9.0))
    assert (shown.value("score_count"), shown.value("flagged_total"), shown.value("threshold")) == (1, None, None)


def test_a_probe_that_pools_by_itself_has_one_distribution_without_a_reduction() -> None:
    pooled = replace(PROBE, output_per=OutputPer.ROLLOUT, default_reduction=None)
    shown = Shown(loaded(pooled)).count(result(3.0))
    assert (shown.value("score_count", reduction=""), shown.value("flagged_total", reduction="")) == (1, 1)


@pytest.mark.parametrize("scope", [Scope.PROMPT, Scope.ALL])
def test_scores_of_prompts_are_not_mixed_with_those_of_completions(scope: Scope) -> None:
    assert Shown(loaded(PROBE)).count(result(3.0), options=replace(ASKED, scope=scope)).value("score_count") == 0


def test_a_rollout_that_gives_nan_is_counted_for_the_probe_that_refused_it() -> None:
    refused = RolloutResult(CompletionScores("", CompletionStatus.NON_FINITE, {}), Usage(), "cheating@1")
    shown = Shown(loaded(PROBE)).count(refused, result(1.0))
    assert shown.registry.get_sample_value("probescore_probe_non_finite_total", {"probe": "cheating", "version": "1"}) == 1
    assert shown.value("score_count") == 1


def test_many_probes_have_no_more_distributions_than_a_scrape_can_carry() -> None:
    many = loaded(*(replace(PROBE, name=f"probe-{index}") for index in range(MAX_DISTRIBUTIONS + 5)))
    (family,) = [each for each in Shown(many).registry.collect() if each.name == "probescore_probe_score"]
    assert sum(sample.name.endswith("_count") for sample in family.samples) == MAX_DISTRIBUTIONS
