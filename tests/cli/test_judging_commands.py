"""``probescore probes evaluate``, ``calibrate``, ``compare`` and ``diff``: on real probes, as an engine and a server serve them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from models import BOS, HIDDEN_SIZE, VOCAB_SIZE
from typer.testing import CliRunner

from probescore import Completion, RolloutGroup
from probescore_audit import calibrate_for_fresh, evaluate
from probescore_probes import ReferenceModel, linear_probe, read_probe_file, write_probe
from probescore_server import Engine
from probescore_server.cli.app import app
from probescore_server.probes.format.manifest import manifest_digest

PROMPTS = 60
PER_PROMPT = 4
ASSISTANT = VOCAB_SIZE - 1  # with this id the template ends a prompt


def run(*arguments: str | Path) -> Result:
    """The command, in this process: torch is imported once."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["probes", *map(str, arguments)])


@pytest.fixture(scope="module")
def lines(model, probe_files) -> list[dict[str, Any]]:
    """240 rollouts of 60 prompts; the label is a noisy reading of ``cheating``."""
    random = np.random.default_rng(3)
    prompts = [[BOS, *random.integers(4, VOCAB_SIZE, 5).tolist()] for _ in range(PROMPTS)]
    rollouts = [(prompt, random.integers(4, VOCAB_SIZE, random.integers(3, 9)).tolist()) for prompt in prompts for _ in range(PER_PROMPT)]
    scores = served_scores(model, probe_files["cheating"], rollouts)
    noisy = scores + scores.std() * random.standard_normal(len(scores))
    return [
        {"prompt": prompt, "completion": completion, "label": bool(value > np.median(noisy)), "slice": "ab"[index % 2]}
        for index, ((prompt, completion), value) in enumerate(zip(rollouts, noisy, strict=True))
    ]


@pytest.fixture
def data(lines, tmp_path) -> Path:
    return written(tmp_path / "held_out.jsonl", lines)


@pytest.fixture(scope="module")
def other_probe(model, tmp_path_factory) -> Path:
    random = np.random.default_rng(8)
    golden = [([BOS, *random.integers(4, VOCAB_SIZE, 5)], random.integers(4, VOCAB_SIZE, 7)) for _ in range(2)]
    path = tmp_path_factory.mktemp("other") / "other.onnx"
    direction = np.random.default_rng(9).standard_normal(HIDDEN_SIZE)
    write_probe(path, linear_probe(direction), ReferenceModel.load(model), name="other", version="1", taps=["resid_post.0"], golden=golden)
    return path


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def served_scores(model, file, rollouts, dtype="float32"):
    engine = Engine.load(str(model), [file], dtype=dtype)
    result = engine.score([RolloutGroup(prompt, [Completion(completion)]) for prompt, completion in rollouts])
    return np.array([next(iter(group.completions[0].scores.values())).value for group in result.groups])


def of(lines):
    return [(line["prompt"], line["completion"]) for line in lines]


# -------------------------------------------------------------------------------------------------------------------------- evaluate


def test_evaluate_gives_the_numbers_of_what_is_served(model, probe_files, lines, data, tmp_path):
    ran = run("evaluate", probe_files["cheating"], data, "--model", model, "--json", tmp_path / "quality.json")
    assert ran.exit_code == 0, ran.output

    found = json.loads((tmp_path / "quality.json").read_text())
    (probe,) = found["probes"]
    scores = served_scores(model, probe_files["cheating"], of(lines))
    stated = read_probe_file(probe_files["cheating"]).manifest
    expected = evaluate(
        scores,
        [line["label"] for line in lines],
        np.arange(len(lines)) // PER_PROMPT,  # rollouts of one prompt are a group
        slices=[line["slice"] for line in lines],
        thresholds=[stated.calibrations[0].threshold],
    )
    assert (probe["probe"], probe["graph_sha256"], probe["reduction"]) == ("cheating@1", stated.graph_sha256, "mean")
    assert [result["slice"] for result in probe["results"]] == ["", "a", "b"]
    for result, quality in zip(probe["results"], expected, strict=True):
        assert (result["positives"], result["negatives"], result["groups"]) == (quality.positives, quality.negatives, quality.groups)
        assert result["auroc"] == pytest.approx(vars(quality.auroc))
        assert result["thresholds"][0]["recall"] == pytest.approx(vars(quality.thresholds[0].recall))
        assert result["thresholds"][0]["false_positives"] == pytest.approx(vars(quality.thresholds[0].false_positives))
    assert f"{expected[0].auroc.value:.3f} ({expected[0].auroc.low:.3f} to {expected[0].auroc.high:.3f})" in ran.output
    assert expected[0].groups == PROMPTS


def test_a_server_and_an_engine_say_the_same(probescore, served, model, probe_files, data, tmp_path):
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    assert run("evaluate", probe_files["cheating"], data, "--model", model, "--json", here).exit_code == 0
    ran = probescore("probes", "evaluate", "cheating", data, "--server", served.address, "--json", there)
    assert ran.returncode == 0, ran.stderr
    one, other = (json.loads(file.read_text()) for file in (here, there))
    assert one["probes"][0]["results"][0] == other["probes"][0]["results"][0]
    assert one["dtype"] == other["dtype"] == "float32"


def test_evaluate_writes_a_new_version_only_if_it_is_asked_to(model, probe_files, data, tmp_path):
    file, target = probe_files["cheating"], tmp_path / "two.onnx"
    before = file.read_bytes()
    assert run("evaluate", file, data, "--model", model).exit_code == 0
    assert file.read_bytes() == before

    assert run("evaluate", file, data, "--model", model, "--write", target, "--version", "2").exit_code == 0
    one, two = read_probe_file(file).manifest, read_probe_file(target).manifest
    assert (two.version, two.graph_sha256, two.golden, two.calibrations) == ("2", one.graph_sha256, one.golden, one.calibrations)
    assert [each.dataset for each in two.evaluations] == ["held_out.jsonl", "held_out.jsonl, a", "held_out.jsonl, b"]
    assert all(each.low <= each.value <= each.high and each.dataset_sha256 for each in two.evaluations)


def test_what_was_fitted_and_calibrated_on_is_left_out(model, probe_files, lines, tmp_path):
    splits = ["train", "calibration", "test", "ood"]
    data = written(tmp_path / "split.jsonl", [{**line, "split": splits[index % 4]} for index, line in enumerate(lines)])
    ran = run("evaluate", probe_files["cheating"], data, "--model", model, "--json", tmp_path / "out.json")
    assert ran.exit_code == 0, ran.output
    result = json.loads((tmp_path / "out.json").read_text())["probes"][0]["results"][0]
    assert result["positives"] + result["negatives"] == len(lines) // 2
    assert f"{len(lines) // 2} rollouts of other splits than test and ood are left out" in ran.output


def test_probes_with_several_labels_need_one_to_be_named(model, probe_files, data):
    ran = run("evaluate", probe_files["mood"], data, "--model", model)
    assert ran.exit_code == 2
    assert "--label: mood@1 has 2 labels; say which one is judged: calm, angry" in ran.output
    assert run("evaluate", probe_files["mood"], data, "--model", model, "--label", "angry").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --model"),
        (["--model", "m", "--server", "s"], "give either --model"),
        (["--model", "m", "--write", "x.onnx"], "--write and --version: give both or neither"),
        (["--server", "s", "--write", "x.onnx", "--version", "2"], "--write: takes one probe file, and --model"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(probe_files, data, arguments, message):
    ran = run("evaluate", probe_files["cheating"], data, *arguments)
    assert (ran.exit_code, message in ran.output) == (2, True), ran.output


def test_groups_that_only_some_lines_name_are_refused(model, probe_files, lines, tmp_path):
    data = written(tmp_path / "some.jsonl", [{**lines[0], "group": "a"}, lines[1]])
    ran = run("evaluate", probe_files["cheating"], data, "--model", model)
    assert (ran.exit_code, ":2: no group, where other lines have one" in ran.output) == (2, True)


# ------------------------------------------------------------------------------------------------------------------------- calibrate


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_calibrate_changes_the_manifest_alone(model, probe_files, lines, data, tmp_path, dtype):
    file, target = probe_files["cheating"], tmp_path / "two.onnx"
    ran = run("calibrate", file, data, "--model", model, "--false-positive-rate", "0.05", "-o", target, "--version", "2", "--dtype", dtype)
    assert ran.exit_code == 0, ran.output

    one, two = read_probe_file(file), read_probe_file(target)
    assert one.graph == two.graph
    same = two.manifest.model_copy(
        update={
            "version": "1",
            "calibrations": one.manifest.calibrations,
            "manifest_sha256": one.manifest.manifest_sha256,
        }
    )
    assert same == one.manifest
    (record,) = two.manifest.calibrations
    negatives = [index for index, line in enumerate(lines) if not line["label"]]
    expected = calibrate_for_fresh(
        served_scores(model, file, of(lines), dtype)[negatives],
        np.array(negatives) // PER_PROMPT,
        false_positive_rate=0.05,
        dataset="held_out.jsonl",
    )
    assert record.model_dump(exclude={"conditions"}) == pytest.approx(vars(expected))
    lengths = [len(lines[index]["completion"]) for index in negatives]
    conditions = record.conditions
    assert (conditions.dtype, conditions.prompt_forms, conditions.groups) == (dtype, ("ids",), len({index // 4 for index in negatives}))
    assert (conditions.shortest_prompt, conditions.longest_prompt) == (6, 6)
    assert (conditions.shortest_completion, conditions.longest_completion) == (min(lengths), max(lengths))
    assert (conditions.prompt_shapes, conditions.generation_prompt_ids) == (("bos text",), (ASSISTANT,))
    shown = run("inspect", target).output.replace("\n", " ")
    assert f"completions of {min(lengths)} to {max(lengths)}; {dtype}" in " ".join(shown.split())
    engine = Engine.load(str(model), [target])
    assert engine.info.probes[0].calibrations[0].threshold == pytest.approx(record.threshold)


def test_files_from_before_conditions_were_recorded_keep_their_digest(probe_files):
    manifest = read_probe_file(probe_files["cheating"]).manifest
    content = manifest.model_dump(mode="json", exclude={"graph_sha256", "manifest_sha256", "special_token_ids"})
    assert content.pop("adapter") is None  # of which no file of then knew
    for field in ("neighbours", "left_out"):
        if not content["golden"][field]:
            del content["golden"][field]
    assert content["calibrations"][0].pop("conditions") is None
    written_then = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert manifest.manifest_sha256 == "sha256:" + hashlib.sha256(written_then).hexdigest()


def test_files_from_before_prompt_shapes_were_recorded_keep_their_digest(model, probe_files, data, tmp_path):
    target = tmp_path / "two.onnx"
    ran = run("calibrate", probe_files["cheating"], data, "-m", model, "--version", "2", "--false-positive-rate", "0.05", "-o", target)
    assert ran.exit_code == 0, ran.output
    manifest = read_probe_file(target).manifest
    without = {"prompt_shapes": (), "generation_prompt_ids": ()}
    (record,) = manifest.calibrations
    older = manifest.model_copy(
        update={"calibrations": (record.model_copy(update={"conditions": record.conditions.model_copy(update=without)}),)}
    )
    content = older.model_dump(mode="json", exclude={"graph_sha256", "manifest_sha256", "special_token_ids"})
    assert content.pop("adapter") is None  # of which no file of then knew
    for field in ("neighbours", "left_out"):
        if not content["golden"][field]:
            del content["golden"][field]
    for field in without:
        assert content["calibrations"][0]["conditions"].pop(field) == []
    written_then = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert manifest_digest(older) == "sha256:" + hashlib.sha256(written_then).hexdigest()


def test_thresholds_of_other_reductions_are_kept(model, probe_files, data, tmp_path):
    two, three = tmp_path / "two.onnx", tmp_path / "three.onnx"
    common = ("--model", model, "--false-positive-rate", "0.05")
    assert run("calibrate", probe_files["cheating"], data, *common, "-r", "max", "-o", two, "--version", "2").exit_code == 0
    assert [each.reduction for each in read_probe_file(two).manifest.calibrations] == ["max", "mean"]
    assert run("calibrate", two, data, *common, "-o", three, "--version", "3").exit_code == 0
    mean, kept = read_probe_file(three).manifest.calibrations
    assert (mean.reduction, kept) == ("mean", read_probe_file(two).manifest.calibrations[0])


@pytest.mark.parametrize(
    ("rate", "version", "message"),
    [
        ("0.001", "2", "cannot support a false-positive rate of 0.001; it takes at least 1000"),
        ("0.05", "1", "--version: '1' is that of the file itself"),
        ("1.5", "2", "false_positive_rate must be in (0, 1)"),
    ],
)
def test_what_cannot_be_calibrated_writes_nothing(model, probe_files, data, tmp_path, rate, version, message):
    target = tmp_path / "two.onnx"
    common = ("--model", model, "-o", target, "--version", version)
    ran = run("calibrate", probe_files["cheating"], data, *common, "--false-positive-rate", rate)
    assert (ran.exit_code, message in ran.output) == (2, True), ran.output
    assert not target.exists()


def test_rollouts_that_all_have_the_behaviour_calibrate_nothing(model, probe_files, lines, tmp_path):
    data = written(tmp_path / "positives.jsonl", [line for line in lines if line["label"]])
    common = ("--model", model, "-o", tmp_path / "two.onnx", "--version", "2", "--false-positive-rate", "0.05")
    ran = run("calibrate", probe_files["cheating"], data, *common)
    assert (ran.exit_code, "a threshold is found on rollouts without it" in ran.output) == (2, True)


def test_texts_and_passages_are_judged_by_their_tokens(model, probe_files, tmp_path):
    texts = [{"prompt": "w5 w6", "completion": {"text": f"w{7 + index} w8 w9", "span_labels": [[0, 5, index % 2]]}} for index in range(40)]
    target = tmp_path / "two.onnx"
    common = ("--model", model, "-o", target, "--version", "2", "--false-positive-rate", "0.1")
    data = written(tmp_path / "texts.jsonl", [{**line, "group": index} for index, line in enumerate(texts)])
    ran = run("calibrate", probe_files["cheating"], data, *common)
    assert ran.exit_code == 0, ran.output
    conditions = read_probe_file(target).manifest.calibrations[0].conditions
    assert conditions.prompt_forms == ("text with special tokens",)
    assert conditions.longest_completion < 4
    assert conditions.prompt_shapes == ("bos text",)


def test_prompts_of_every_shape_are_recorded_however_they_were_given(model, probe_files, tmp_path):
    file, target = tmp_path / "any.onnx", tmp_path / "two.onnx"
    random = np.random.default_rng(8)
    golden = [([BOS, *random.integers(4, VOCAB_SIZE, 5)], random.integers(4, VOCAB_SIZE, 7)) for _ in range(2)]
    reference = ReferenceModel.load(model)
    write_probe(
        file, linear_probe(random.standard_normal(HIDDEN_SIZE)), reference, name="any", version="1", taps=["resid_post.1"], golden=golden
    )
    prompts = [[], [7, 8], [BOS, 7], [7, ASSISTANT], [{"role": "user", "content": "w5"}], [BOS]]
    lines = [{"prompt": prompt, "completion": [index + 5, 6], "label": 0} for index in range(8) for prompt in prompts]
    data = written(tmp_path / "shapes.jsonl", [*lines, {"prompt": [], "completion": [BOS, 6], "label": 0}])
    ran = run("calibrate", file, data, "-m", model, "--version", "2", "--false-positive-rate", "0.1", "-o", target)
    assert ran.exit_code == 0, ran.output
    conditions = read_probe_file(target).manifest.calibrations[0].conditions
    assert conditions.prompt_shapes == ("bos empty", "bos template", "bos text", "empty", "template", "text")
    assert conditions.prompt_forms == ("chat", "ids")
    assert (conditions.shortest_prompt, conditions.longest_prompt) == (0, 4)


# --------------------------------------------------------------------------------------------------------------------------- compare


def test_compare_pairs_rollouts_and_lists_where_the_two_differ(model, probe_files, other_probe, lines, data, tmp_path):
    calibrated = tmp_path / "other-2.onnx"
    common = ("--model", model, "--false-positive-rate", "0.05", "-o", calibrated, "--version", "2")
    assert run("calibrate", other_probe, data, *common).exit_code == 0
    ran = run("compare", probe_files["cheating"], calibrated, data, "--model", model, "--json", tmp_path / "out.json", "--show", "3")
    assert ran.exit_code == 0, ran.output
    found = json.loads((tmp_path / "out.json").read_text())
    first, second = (served_scores(model, file, of(lines)) for file in (probe_files["cheating"], calibrated))
    assert found["pearson"] == pytest.approx(np.corrcoef(first, second)[0, 1])
    assert found["auroc_difference"]["value"] == pytest.approx(found["probes"][0]["auroc"]["value"] - found["probes"][1]["auroc"]["value"])
    assert found["auroc_difference"]["low"] > 0  # the label is a reading of the first
    assert sum(found["flags_of_positives"].values()) == sum(line["label"] for line in lines)
    assert len(found["furthest_apart"]) == 3
    assert [abs(entry["rank_gap"]) for entry in found["furthest_apart"]] == sorted(
        (abs(entry["rank_gap"]) for entry in found["furthest_apart"]), reverse=True
    )
    where = found["furthest_apart"][0]
    assert where["scores"] == pytest.approx(
        [first[int(where["where"].rsplit(":", 1)[1]) - 1], second[int(where["where"].rsplit(":", 1)[1]) - 1]]
    )
    assert "difference, paired" in ran.output


def test_a_new_version_ranks_as_the_one_before(model, probe_files, data, tmp_path):
    two = tmp_path / "two.onnx"
    common = ("--model", model, "--false-positive-rate", "0.05")
    assert run("calibrate", probe_files["cheating"], data, *common, "-o", two, "--version", "2").exit_code == 0
    ran = run("compare", probe_files["cheating"], two, data, "--model", model, "--json", tmp_path / "out.json")
    assert ran.exit_code == 0, ran.output
    assert json.loads((tmp_path / "out.json").read_text())["auroc_difference"] == {"value": 0, "low": 0, "high": 0}


def test_served_probes_are_compared_by_name(probescore, served, data, tmp_path):
    ran = probescore("probes", "compare", "cheating", "cheating", data, "--server", served.address)
    assert (ran.returncode, "cheating@1: given for the second time" in ran.stderr) == (2, True)
    ran = probescore("probes", "evaluate", "nothing", data, "--server", served.address)
    assert (ran.returncode, "nothing: no such probe at the server; it has cheating@1, mood@1" in ran.stderr) == (2, True)


# --------------------------------------------------------------------------------------------------------------------- list and diff


def test_list_shows_the_probe_files_of_a_folder_and_names_those_that_are_refused(probe_files, tmp_path):
    ran = run("list", probe_files["cheating"].parent)
    assert (ran.exit_code, "cheating@1" in ran.output, "mood@1" in ran.output) == (0, True, True)
    assert (run("list", tmp_path).exit_code, run("list", tmp_path / "missing").exit_code) == (2, 2)

    (tmp_path / "good.onnx").write_bytes(probe_files["mood"].read_bytes())
    (tmp_path / "bad.onnx").write_bytes(b"")
    ran = run("list", tmp_path)
    assert (ran.exit_code, "mood@1" in ran.output, "bad.onnx" in ran.output, "an empty file" in ran.output) == (1, True, True, True)


def test_diff_tells_graphs_from_manifests(model, probe_files, other_probe, data, tmp_path):
    two = tmp_path / "two.onnx"
    common = ("--model", model, "--false-positive-rate", "0.05", "-o", two, "--version", "2")
    assert run("calibrate", probe_files["cheating"], data, *common).exit_code == 0

    same = run("diff", probe_files["cheating"], probe_files["cheating"])
    assert "the manifests are equal" in same.output
    versions = run("diff", probe_files["cheating"], two)
    assert "the graphs are equal, byte for byte" in versions.output
    for field in ("version", "calibrations[0].threshold", "calibrations[0].dataset"):
        assert field in versions.output
    assert "golden" not in versions.output
    others = run("diff", probe_files["cheating"], other_probe)
    assert "the graphs differ" in others.output
    assert "inputs[0].layer" in others.output
    assert {same.exit_code, versions.exit_code, others.exit_code} == {0}


def test_diff_refuses_what_is_no_probe(probe_files, tmp_path):
    (tmp_path / "none.onnx").write_bytes(b"")
    ran = run("diff", probe_files["cheating"], tmp_path / "none.onnx")
    assert (ran.exit_code, "an empty file" in ran.output) == (1, True)
