"""What ``exclude_special_tokens`` leaves out is part of the probe, whatever the tokenizer beside the served model says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from engine_probes import Probe, linear, plain, pooled_mean
from models import EOS, PAD, tiny_model
from structlog.testing import capture_logs

from probescore.types import RolloutGroup
from probescore_probes.reference import ReferenceModel
from probescore_server import Engine
from probescore_server.errors import ProbeRefused
from probescore_server.probes.format.manifest import Manifest
from probescore_server.probes.format.probe_file import read_probe_file, write_probe_file

PROMPT, ANSWER = [1, 20, 33, 47], [9, PAD, 60, 31, EOS]
WORD = 31


def tokenizers() -> dict[str, Callable[[dict[str, object]], object]]:
    """Ways in which a trainer's tokenizer differs though ids mean the same."""
    return {
        "no padding": lambda settings: settings.pop("pad_token"),
        "padding is EOS": lambda settings: settings.update(pad_token="</s>"),
        "padding is a word": lambda settings: settings.update(pad_token=f"w{WORD}"),
        "a word is special": lambda settings: settings.update(extra_special_tokens=[f"w{WORD}"]),
        "a word separates": lambda settings: settings.update(sep_token=f"w{WORD}"),
    }


def with_tokenizer(directory: Path, change: str) -> Path:
    model = Path(shutil.copytree(tiny_model(), directory / "model"))
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    tokenizers()[change](settings)
    path.write_text(json.dumps(settings))
    return model


@pytest.mark.parametrize("change", tokenizers())
def test_another_tokenizer_leaves_out_the_same_ids(change: str, reference: ReferenceModel, tmp_path: Path) -> None:
    files = [probe(exclude_special_tokens=True).write(tmp_path, reference) for probe in (linear, pooled_mean)]
    engine = Engine.load(str(with_tokenizer(tmp_path, change)), files)
    assert engine.info.tokenizer_fingerprint == reference.tokenizer_fingerprint

    result = engine.score([RolloutGroup(PROMPT, [ANSWER])])

    expected = plain(reference, PROMPT, ANSWER)[4:][[0, 2, 3]].mean()
    assert result.values("linear")[0] == pytest.approx(expected, abs=1e-5)
    assert result.values("pooled-mean")[0] == pytest.approx(expected, abs=1e-5)


def unnamed(file: Path) -> Path:
    """The file as it was written before manifests named the ids."""
    probe = read_probe_file(file)
    write_probe_file(file, onnx.load_from_string(probe.graph), probe.manifest.model_copy(update={"special_token_ids": None}))
    assert "special_token_ids" not in probe_json(file) or probe_json(file)["special_token_ids"] is None
    return file


@pytest.mark.parametrize(
    ("change", "further"), [(None, PAD), ("padding is a word", WORD), ("a word is special", WORD), ("a word separates", WORD)]
)
@pytest.mark.parametrize("probe", [linear, pooled_mean])
def test_a_file_that_does_not_name_them_says_in_every_answer_that_it_may_have_left_out_others(
    change: str | None, further: int, probe: Callable[..., Probe], reference: ReferenceModel, tmp_path: Path
) -> None:
    file = unnamed(probe(exclude_special_tokens=True).write(tmp_path, reference))
    model = str(with_tokenizer(tmp_path, change) if change else tiny_model())
    name = read_probe_file(file).manifest.name
    with capture_logs() as logs:
        engine = Engine.load(model, [file])

    (warning,) = [log["problem"] for log in logs if log["event"] == "a probe file does not name its special tokens"]
    assert str(further) in warning
    assert "write the file again" in warning
    result = engine.score([RolloutGroup(PROMPT, [ANSWER])])
    assert result.info.probes[0].accepted_mismatches == engine.info.probes[0].accepted_mismatches == ("special_token_ids",)
    assert result.values(name)[0] == pytest.approx(plain(reference, PROMPT, ANSWER)[4:][:4].mean(), abs=1e-5)


@pytest.mark.parametrize("change", ["no padding", "padding is EOS"])
def test_a_file_that_does_not_name_them_leaves_out_what_the_fingerprint_tells_of(
    change: str, reference: ReferenceModel, tmp_path: Path
) -> None:
    file = unnamed(linear(exclude_special_tokens=True).write(tmp_path, reference))

    result = Engine.load(str(with_tokenizer(tmp_path, change)), [file]).score([RolloutGroup(PROMPT, [ANSWER])])

    assert result.values("linear")[0] == pytest.approx(plain(reference, PROMPT, ANSWER)[4:][:4].mean(), abs=1e-5)


def test_a_file_that_leaves_none_out_need_name_none(reference: ReferenceModel, tmp_path: Path) -> None:
    file = linear().write(tmp_path, reference)
    assert read_probe_file(file).manifest.special_token_ids is None
    assert Engine.load(str(tiny_model()), [file]).info.probes[0].accepted_mismatches == ()


def probe_json(file: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads(onnx.load(str(file)).metadata_props[0].value)
    return content


def test_probes_with_other_ids_are_told_apart_in_one_batch(reference: ReferenceModel, tmp_path: Path) -> None:
    files = []
    for name, ids in (("none", ()), ("padding", (PAD,)), ("word", (WORD,)), ("both", (PAD, WORD))):
        file = linear(name, exclude_special_tokens=True).write(tmp_path, reference)
        probe = read_probe_file(file)
        write_probe_file(file, onnx.load_from_string(probe.graph), probe.manifest.model_copy(update={"special_token_ids": ids}))
        files.append(file)

    result = Engine.load(str(tiny_model()), files).score([RolloutGroup(PROMPT, [ANSWER])])

    each = plain(reference, PROMPT, ANSWER)[4:]
    for name, kept in (("none", [0, 1, 2, 3, 4]), ("padding", [0, 2, 3, 4]), ("word", [0, 1, 2, 4]), ("both", [0, 2, 4])):
        assert result.values(name)[0] == pytest.approx(each[kept].mean(), abs=1e-5), name


def test_the_digest_covers_them_and_files_without_keep_theirs(reference: ReferenceModel, tmp_path: Path) -> None:
    written = read_probe_file(linear(exclude_special_tokens=True).write(tmp_path, reference)).manifest
    assert written.special_token_ids == (0, 1, 2, 3)
    without = read_probe_file(linear("other").write(tmp_path, reference)).manifest
    assert without.special_token_ids is None
    content = without.model_dump(mode="json")
    del content["special_token_ids"]
    assert Manifest.model_validate_json(json.dumps(content)) == without


@pytest.mark.parametrize("ids", [[2, 1], [1, 1], [-1], [2**31]])
def test_ids_that_make_no_sense_are_refused(ids: list[int], reference: ReferenceModel, tmp_path: Path) -> None:
    file = linear(exclude_special_tokens=True).write(tmp_path, reference)
    manifest = read_probe_file(file).manifest.model_copy(update={"special_token_ids": tuple(ids)})
    with pytest.raises(ProbeRefused, match="special_token_ids"):
        write_probe_file(file, onnx.load_from_string(read_probe_file(file).graph), manifest)
