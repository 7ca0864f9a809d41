"""Beside the verdict on a probe: probes that the trainer never sees, and what needs no probe."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from recorded_runs import KEY, write_run

from benchmarks.simulated_runs import THRESHOLD, Change
from probescore_audit import Verdict, audit_record
from probescore_audit.record import RecordedProbe, RecordWriter, read_record
from probescore_audit.report import numbers_of, report_page

HELD, MOOD = "cheating-held@1", "mood@2"


def write_three_probes(folder, held_out_sees):
    """The rewarded probe goes blind on the policy; of a held-out one it is said whether it does; a monitor reads something else."""
    truth = write_run(folder, [Change(positive_rate=0.4)] * 14, policy=[Change(hidden=0.95)] * 14)
    record = read_record(folder)
    rng = np.random.default_rng(5)
    thresholds = {"mean": THRESHOLD}
    probes = (
        RecordedProbe(key=KEY, thresholds=thresholds),
        RecordedProbe(key=HELD, thresholds=thresholds, role="held_out"),
        RecordedProbe(key=MOOD, thresholds=thresholds, role="monitor"),
    )
    with RecordWriter(folder, replace(record.header.anew(), probes=probes)) as writer:
        for row in record.rollouts:
            own = row.scores[KEY]
            positive = truth[row.step, row.rollout]
            held = {"policy": own["frozen"]} if held_out_sees else own
            mood = {"frozen": {"mean": rng.standard_normal() + 3.1 * positive}}
            tokens = int(rng.integers(5, 15))
            logprob = tokens * (-2.0 - 0.4 * positive + 0.1 * rng.standard_normal())
            scores = {KEY: own, HELD: {"policy": held["policy"]}, MOOD: mood}
            writer.append([replace(row, scores=scores, tokens=tokens, policy_logprob=logprob)])
        for row in record.references:
            writer.append([replace(row, scores=dict.fromkeys((KEY, HELD, MOOD), row.scores[KEY]))])
    return audit_record(read_record(folder))


@pytest.fixture(scope="module", params=[True, False], ids=["seen", "hidden"])
def audit(request, tmp_path_factory):
    return request.param, write_three_probes(tmp_path_factory.mktemp("run"), request.param)


def of(audit, probe, reading):
    (found,) = (each for each in audit.readings if (each.recorded.probe, each.recorded.reading) == (probe, reading))
    return found


def test_each_probe_and_reading_has_its_verdict(audit):
    sees, found = audit
    verdicts = {(each.recorded.probe, each.recorded.reading): each.verdict for each in found.readings}
    assert verdicts == {
        (KEY, "frozen"): Verdict.BEHAVIOUR_ROSE,
        (KEY, "policy"): Verdict.EVADED,
        (HELD, "policy"): Verdict.BEHAVIOUR_ROSE if sees else Verdict.EVADED,
        (MOOD, "frozen"): Verdict.BEHAVIOUR_ROSE,
    }
    html = report_page(found)
    for probe, reading in verdicts:
        assert f"{probe}, {reading}: <span" in html
        assert html.count(f"<td>{reading}</td>") >= 1
    assert len({(each["probe"], each["reading"]) for each in numbers_of(found)["readings"]}) == 4


def test_the_chance_of_a_false_alarm_is_shared_by_all_of_them(audit):
    _, found = audit
    assert [watch.enough for each in found.readings for watch in each.audit.watches] == pytest.approx([-np.log(0.05 / 8)] * 8)


def test_a_held_out_probe_says_whether_the_behaviour_hides_from_it_too(audit):
    sees, found = audit
    (said,) = (notice for notice in found.notices if "the trainer never sees this probe" in notice)
    assert said.startswith(f"{HELD}, policy")
    assert ("it still sees the behaviour" in said) == sees
    assert ("not hidden from it alone" in said) == (not sees)


def test_nobody_is_told_to_stop_for_a_probe_that_rewards_nothing(audit):
    sees, found = audit
    step = of(found, HELD, "policy").next_step
    assert "Stop" not in step
    assert ("goes by this probe as well" in step) == (not sees)
    assert of(found, KEY, "policy").next_step.startswith("This run should have been stopped")


def test_beside_the_rewarded_probe_stand_the_held_out_one_and_the_baselines(audit):
    sees, found = audit
    beside = {(one.name, one.kind): one for one in of(found, KEY, "policy").companions}
    assert set(beside) == {(HELD, "held out"), ("log-probability of a token", "baseline"), ("number of tokens", "baseline")}
    assert (beside[HELD, "held out"].auroc.low > 0.9) == sees
    assert beside[HELD, "held out"].before.low > 0.95
    assert beside["log-probability of a token", "baseline"].auroc.low > 0.9  # positives are the less probable ones: reversed
    assert beside["number of tokens", "baseline"].auroc.low < 0.5 < beside["number of tokens", "baseline"].auroc.high
    assert {one.name for one in of(found, KEY, "frozen").companions} == {"log-probability of a token", "number of tokens"}
    assert "AUROC of log-probability of a token (baseline)" in report_page(found)
    policy = next(each for each in numbers_of(found)["readings"] if (each["probe"], each["reading"]) == (KEY, "policy"))
    assert len(policy["companions"]) == 3
    assert policy["companions"][1]["before"]["value"] is None
