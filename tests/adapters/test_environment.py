"""A scorer out of environment variables: what is set arrives, and what is wrong is named with the variable, the field and the value."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from running_server import RunningServer

from probescore_adapters import GuardRails, Mode, Policy, ProbeSignal, RecordOptions, Rollout, SignalError
from probescore_adapters.environment import rails_from, record_from, scorer_from_environment, signals_from
from probescore_audit.record import RecordWriter, RunHeader, read_record
from probescore_server.settings import ServerSettings

CHEATING = {"probe": "cheating", "mode": "reward"}


def variables(**given: str) -> dict[str, str]:
    return {f"PROBESCORE_{name.upper()}": value for name, value in given.items()}


def test_what_is_set_arrives() -> None:
    signals = [{"probe": "cheating", "weight": 2, "threshold": 0.5, "reduction": "topk_mean(8)"}, {"probe": "mood@1", "mode": "monitor"}]
    scorer = scorer_from_environment(
        variables(
            signals=json.dumps(signals),
            address=" a:1, b:2 ",
            on_failure="-2.5",
            on_unscorable="raise",
            timeout="10",
            wait_seconds="20",
            follow="True",
            rails='{"clip": 3, "check_penalty": false}',
        )
    )
    assert scorer.signals == tuple(ProbeSignal(**signal) for signal in signals)  # type: ignore[arg-type]
    assert scorer.policy == Policy(on_failure=-2.5, on_unscorable="raise", timeout=10, wait_seconds=20)
    assert scorer.rails == GuardRails(clip=3, check_penalty=False)
    assert scorer.follow


def test_what_is_not_set_is_the_default() -> None:
    scorer = scorer_from_environment(variables(signals=json.dumps(CHEATING), on_failure="", rails=" "))
    assert (scorer.policy, scorer.rails, scorer.follow) == (Policy(), GuardRails(), False)


@pytest.mark.parametrize("written", [CHEATING, [CHEATING]], ids=["one", "a list"])
def test_signals_may_be_in_a_file(tmp_path: Path, written: Any) -> None:
    file = tmp_path / "signals.json"
    file.write_text(json.dumps(written))
    assert scorer_from_environment(variables(signals=str(file))).signals == (ProbeSignal("cheating", mode="reward"),)


def test_scorer_of_the_environment_scores(served: RunningServer) -> None:
    before = len(served.events("scored"))
    scorer = scorer_from_environment(variables(signals=json.dumps(CHEATING), address=served.address, run_id="run-7"))
    assert not scorer.score([Rollout([1, 5], [6, 7])]).unscorable.any()
    assert served.wait_for("scored", count=before + 1)["run_id"] == "run-7"  # logged once the answer is on its way


WRONG = {
    "neither true nor false": ({"signals": "{}", "follow": "follow"}, "PROBESCORE_FOLLOW: expected true or false, got 'follow'"),
    "nothing": ({}, "PROBESCORE_SIGNALS: required"),
    "no such file": ({"signals": "nowhere.json"}, r"PROBESCORE_SIGNALS: neither JSON nor a file .*'nowhere.json'"),
    "not JSON": ({"signals": "[{"}, "PROBESCORE_SIGNALS: not JSON"),
    "nested too deeply": ({"signals": "[" * 100_000}, "PROBESCORE_SIGNALS: not JSON"),
    "no list": ({"signals": '["cheating"]'}, r"PROBESCORE_SIGNALS\[0\]: expected an object, got 'cheating'"),
    "no signal": ({"signals": "[]"}, "PROBESCORE_SIGNALS.signals: at least one"),
    "mistyped": ({"signals": '{"probe": "a", "weigth": 2}'}, r"PROBESCORE_SIGNALS\[0\]: weigth: there is no such field; .*weight"),
    "no probe": ({"signals": '[{"probe": "a"}, {"mode": "reward"}]'}, r"PROBESCORE_SIGNALS\[1\]\.probe: expected a name"),
    "mode": ({"signals": '{"probe": "a", "mode": "punish"}'}, r"PROBESCORE_SIGNALS\[0\]\.mode: 'punish' is none of"),
    "weight": ({"signals": '{"probe": "a", "weight": NaN}'}, r"PROBESCORE_SIGNALS\[0\]\.weight: expected a finite number"),
    "weight of words": ({"signals": '{"probe": "a", "weight": "2"}'}, r"PROBESCORE_SIGNALS\[0\]\.weight: .* got '2'"),
    "reduction": ({"signals": '{"probe": "a", "reduction": 8}'}, r"PROBESCORE_SIGNALS\[0\]\.reduction: expected a string, got 8"),
    "mask": ({"signals": '{"probe": "a", "mask": [1, 0]}'}, r"PROBESCORE_SIGNALS\[0\]\.mask: expected a string, got \[1, 0\]"),
    "one name twice": ({"signals": '[{"probe": "a"}, {"probe": "a"}]'}, "PROBESCORE_SIGNALS.name: two signals are called 'a'"),
    "policy": ({"signals": '{"probe": "a"}', "on_failure": "zero"}, "PROBESCORE_ON_FAILURE: expected .* got 'zero'"),
    "policy of nan": ({"signals": '{"probe": "a"}', "on_failure": "nan"}, "PROBESCORE_ON_FAILURE: expected .* got nan"),
    "timeout": ({"signals": '{"probe": "a"}', "timeout": "-1"}, "PROBESCORE_TIMEOUT: expected seconds above 0"),
    "rails": ({"signals": '{"probe": "a"}', "rails": '{"clip": -1}'}, "PROBESCORE_RAILS: clip must be"),
    "rails of words": ({"signals": '{"probe": "a"}', "rails": '{"clip": "3"}'}, "PROBESCORE_RAILS: clip: expected a number, got '3'"),
    "switch": ({"signals": '{"probe": "a"}', "rails": '{"check_penalty": 1}'}, "PROBESCORE_RAILS: check_penalty: expected true or false"),
    "unknown rail": ({"signals": '{"probe": "a"}', "rails": '{"clop": 1}'}, "PROBESCORE_RAILS: clop: there is no such field"),
    "address": ({"signals": '{"probe": "a"}', "address": "scorer"}, "PROBESCORE_ADDRESS: .*'scorer'"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_named(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scorer_from_environment(variables(**given))


def test_no_variable_means_another_thing_to_the_server() -> None:
    """One environment may hold the settings of a server, of a gateway and of a trainer."""
    ours = {"signals", "address", "rails", "run_id", "job", "tokenizer_fingerprint", "task_reward", *asdict(Policy())}
    ours |= {"gateway_host", "gateway_port", "gateway_max_body_bytes"}
    assert not ours & set(ServerSettings.model_fields)


def test_signals_of_keyword_arguments_may_have_functions_and_nulls() -> None:
    """As YAML gives them: null is what is not given."""

    def first_half(ids: Any) -> Any:
        return ids < 10

    (signal,) = signals_from([{"probe": "cheating", "mask": first_half, "threshold": None, "mode": "monitor"}])
    assert (signal.mask, signal.threshold, signal.mode) == (first_half, None, Mode.MONITOR)


def test_error_says_which_signal() -> None:
    with pytest.raises(SignalError) as caught:
        signals_from([CHEATING, {"probe": "mood", "weight": 0}], "reward_kwargs.signals")
    assert caught.value.field == "reward_kwargs.signals[1].weight"


def test_rails_keep_the_defaults_of_what_is_not_given() -> None:
    assert rails_from({"max_screened_share": 0.25}) == GuardRails(max_screened_share=0.25)


def test_a_record_is_a_folder_or_an_object(served: RunningServer, tmp_path: Path) -> None:
    written = {"directory": str(tmp_path / "b"), "rollouts_per_step": 2, "texts": True, "checker": "math:isfinite", "late_steps": 1}
    for name, given in (("a", str(tmp_path / "a")), ("b", json.dumps(written))):
        scorer = scorer_from_environment(variables(signals=json.dumps(CHEATING), address=served.address, record=given, run_id="run-7"))
        for step in range(3):
            scorer.score([Rollout([1, 5], [6, 7])] * 2, step=None if name == "b" else step)
        record = read_record(tmp_path / name)
        assert record.header.run_id == "run-7"
        assert [row.step for row in record.rollouts] == [0, 0, 1, 1, 2, 2]
    assert record_from("runs/a") == RecordOptions("runs/a", late_steps=4, batches_per_step=0)
    assert record_from(written).checker is math.isfinite
    assert record_from(written).late_steps == 1


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({}, "PROBESCORE_RECORD.directory: expected the path of a folder, got ''"),
        ({"directory": "a", "steps": 3}, "PROBESCORE_RECORD: steps: there is no such field; there are directory, "),
        ({"directory": "a", "late_steps": "x"}, "PROBESCORE_RECORD.late_steps: expected a whole number of at least 0, got 'x'"),
        ({"directory": "a", "checker": "nowhere:at_all"}, "PROBESCORE_RECORD.checker: expected module:function"),
    ],
)
def test_a_wrong_record_is_named(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        scorer_from_environment(variables(signals=json.dumps(CHEATING), record=json.dumps(given)))


def test_the_record_of_another_run_is_named_by_its_variable(tmp_path: Path) -> None:
    with RecordWriter(tmp_path, RunHeader(run_id="sort-7", planned_steps=1)):
        pass
    with pytest.raises(ValueError, match=r"PROBESCORE_RECORD: .* has the record of the run 'sort-7'"):
        scorer_from_environment(variables(signals=json.dumps(CHEATING), record=str(tmp_path), run_id="sort-8"))
