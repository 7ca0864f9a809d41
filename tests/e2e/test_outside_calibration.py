"""A score outside what its threshold was found on is flagged: in answers of every kind, in metrics, and for clients of either age."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from calls import TIMEOUT, connected, eventually, group, request, scrape
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from models import BOS, VOCAB_SIZE
from running_server import RunningServer, start_server

from probescore import Completion, ProbeClient, RolloutGroup, ScoreResult, UnmetCondition
from probescore.types import CompletionScores, score_keys
from probescore.wire import result_from_proto, result_to_proto
from probescore_probes import read_probe_file
from probescore_server import Engine
from probescore_server.probes.format.manifest import CalibrationConditions, CalibrationRecord
from probescore_server.probes.format.new_version import write_new_version

ASSISTANT = VOCAB_SIZE - 1
CONTRACT = Path(__file__).parents[2] / "proto"

# What comes of each, with thresholds from completions of 2 to 4 tokens after chats of 3 to 5 tokens, and for `max` of up to 300 tokens.
ROLLOUTS = {
    "alike": (RolloutGroup([BOS, 5, ASSISTANT], [[7, 8, 9]]), set()),
    "long": (RolloutGroup([BOS, 5, ASSISTANT], [[7, 8, 9, 10, 11]]), {("completion_length", "mean")}),
    "long under its mask": (
        RolloutGroup([BOS, 5, ASSISTANT], [Completion([7, 8, 9, 10], mask=[1, 0, 0, 0])]),
        {("completion_length", "mean"), ("completion_length", "max")},
    ),
    "without the template": (RolloutGroup([BOS, 5, 6], [[7, 8]]), {("prompt_shape", "mean"), ("prompt_shape", "max")}),
    "without BOS": (RolloutGroup([5, 6, ASSISTANT], [[7, 8]]), {("prompt_shape", "mean"), ("prompt_shape", "max")}),
    "without a prompt": (
        RolloutGroup([], [[7, 8]]),
        {(name, reduction) for name in ("prompt_shape", "prompt_length") for reduction in ("mean", "max")},
    ),
    "of nothing": (RolloutGroup([], [Completion([7, 8], mask=[0, 0])]), set()),
}


@pytest.fixture(scope="module")
def folder(model: Path, probe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``direction`` without a calibration, and its version 2 with thresholds for two reductions."""
    conditions = CalibrationConditions(
        groups=20,
        dtype="float32",
        shortest_prompt=3,
        longest_prompt=5,
        shortest_completion=2,
        longest_completion=4,
        prompt_forms=["chat"],
        prompt_shapes=["bos template"],
        generation_prompt_ids=[ASSISTANT],
    )
    record = CalibrationRecord(
        threshold=0.5,
        false_positive_rate=0.05,
        false_positive_rate_low=0.01,
        false_positive_rate_high=0.1,
        negatives=100,
        dataset="honest rollouts",
        reduction="mean",
        conditions=conditions,
    )
    longer = record.model_copy(update={"reduction": "max", "conditions": conditions.model_copy(update={"longest_completion": 300})})
    folder = tmp_path_factory.mktemp("calibrated")
    write_new_version(folder / "two.onnx", read_probe_file(probe_file), version="2", calibrations=[record, longer])
    (folder / "one.onnx").write_bytes(probe_file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def server(model: Path, folder: Path) -> Iterator[RunningServer]:
    with start_server(model, [folder]) as server:
        yield server


def found(scored: CompletionScores, key: str = "direction") -> set[tuple[str, str]]:
    return {(each.condition, str(each.reduction)) for each in scored[key].unmet}


def check(result: ScoreResult) -> None:
    (probe,) = result.info.probes
    completions = [scored for one in result.groups for scored in one]
    assert {name: found(scored) for name, scored in zip(ROLLOUTS, completions, strict=True)} == {
        name: expected for name, (_, expected) in ROLLOUTS.items()
    }
    for outside in probe.outside_calibration:
        assert outside.completions == tuple(index for index, scored in enumerate(completions) if outside.unmet in scored["direction"].unmet)
    assert {outside.unmet for outside in probe.outside_calibration} == {
        each for scored in completions for each in scored["direction"].unmet
    }


def test_answers_say_which_completions_are_outside_and_why(server: RunningServer, model: Path, folder: Path) -> None:
    groups = [one for one, _ in ROLLOUTS.values()]
    asked = {"probes": ["direction@2"], "reductions": ["mean", "max"]}
    with ProbeClient(server.address) as client:
        check(client.score(groups, **asked))
        streamed = {answer.group_index: answer for answer in client.score_stream(groups, **asked)}
    assert {name: found(streamed[index].scores) for index, name in enumerate(ROLLOUTS)} == {
        name: expected for name, (_, expected) in ROLLOUTS.items()
    }
    check(Engine.load(str(model), [folder / "two.onnx"]).score(groups, **asked))


def test_only_what_was_asked_for_and_written_down_is_compared(server: RunningServer) -> None:
    groups = [one for one, _ in ROLLOUTS.values()]
    with ProbeClient(server.address) as client:
        (one,) = client.score(groups, probes=["direction@1"]).info.probes
        (least,) = client.score(groups, probes=["direction@2"], reductions=["min"]).info.probes
        both = client.score(groups, probes=["direction@1", "direction@2"])
        whole = client.score(groups, probes=["direction@2"], scope="all")
        conditions = client.list_probes()[1].calibrations[0].conditions
    assert one.outside_calibration == least.outside_calibration == ()
    keys = score_keys(both.info.probes)
    assert [found(scored, keys[0]) for scored in both.groups[5]] == [set()]
    assert [found(scored, keys[1]) for scored in both.groups[5]] == [{("prompt_shape", "mean"), ("prompt_length", "mean")}]
    # of "nothing" alone no token counts
    assert [outside.completions for outside in whole.info.probes[0].outside_calibration] == [(0, 1, 2, 3, 4, 5)]
    assert whole.groups[0][0]["direction"].unmet == (UnmetCondition("scope", whole.info.probes[0].reductions[0]),)
    assert (conditions.longest_completion, conditions.prompt_shapes, conditions.generation_prompt_ids) == (
        4,
        ("bos template",),
        (ASSISTANT,),
    )


def test_each_rollout_is_counted_once_for_each_condition(server: RunningServer) -> None:
    def counts() -> dict[str, float]:
        samples = scrape(server)
        names = {
            name: f'outside_calibration_total{{condition="{name}",'
            for name in ("completion_length", "prompt_length", "prompt_shape", "scope")
        }
        names["compared"] = "compared_total{"
        return {name: samples.get(f'probescore_probe_{start}probe="direction",version="2"}}', 0.0) for name, start in names.items()}

    groups = [one for one, _ in ROLLOUTS.values()]
    expected = {"completion_length": 2, "prompt_length": 1, "prompt_shape": 3, "scope": 0, "compared": 6}
    with ProbeClient(server.address) as client:
        for call in (client.score, lambda *args, **options: list(client.score_stream(*args, **options))):
            before = counts()
            call(groups, probes=["direction@1", "direction@2"], reductions=["mean", "max"])
            eventually(lambda before=before: {name: after - before[name] for name, after in counts().items()} == expected)
    # a probe that says nothing of its negatives has no series, so that no share of nothing is shown
    assert not [name for name in scrape(server) if 'version="1"' in name and ("_compared_" in name or "_outside_calibration_" in name)]


def test_clients_and_servers_of_either_age_understand_each_other(server: RunningServer) -> None:
    long = request(group([BOS, 5, ASSISTANT], [7, 8, 9, 10, 11], [7, 8, 9]), probes=["direction@2"])
    with connected(server) as stub:
        answer = stub.Score(long, timeout=TIMEOUT)
    assert [place for outside in answer.info.probes[0].outside_calibration for place in outside.completions] == [0]
    # an older client reads the answer by the contract that it was made with, and misses nothing else
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString((CONTRACT / "baseline.binpb").read_bytes()).file:
        pool.Add(file)
    older = message_factory.GetMessageClass(pool.FindMessageTypeByName("probescore.v1.ScoreResponse"))
    read = older.FromString(answer.SerializeToString())
    read.DiscardUnknownFields()
    assert [one.scores[0].reduced.data for one in read.groups[0].completions] == [
        one.scores[0].reduced.data for one in answer.groups[0].completions
    ]
    # and what an older server sends flags nothing
    from_older = result_from_proto(type(answer).FromString(read.SerializeToString()))
    result = result_from_proto(answer)
    assert from_older.info.probes == tuple(replace(probe, outside_calibration=()) for probe in result.info.probes)
    assert [scored["direction"].unmet for scored in from_older.groups[0]] == [(), ()]
    np.testing.assert_array_equal(from_older.values("direction"), result.values("direction"))
    assert result_from_proto(result_to_proto(result)).info == result.info
