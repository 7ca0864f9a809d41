"""A worker tells the place that it reads from those beside it, in every dtype; where a dtype cannot, it says so and float32 serves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from engine_probes import linear, pooled_mean, running_mean
from models import HIDDEN_SIZE, VOCAB_SIZE, tiny_model
from safetensors.torch import load_file, save_file

from probescore.types import ScoreUnit
from probescore_probes import FollowUp, Tolerance, linear_probe, onnx_probe, write_probe
from probescore_probes.reference import ReferenceModel
from probescore_server import Engine
from probescore_server.errors import ProbeRefused
from probescore_server.probes.format.manifest import Manifest, Neighbour, TapInput, manifest_digest, neighbouring_places
from probescore_server.probes.format.probe_file import ProbeFile, read_probe_file, write_probe_file

LAYERS = 12
STATED = 6
DTYPES = ("float32", "bfloat16", "float16")


def with_small_steps(directory: Path, step: float) -> Path:
    """A model of 12 blocks, each of which adds about ``step`` of the stream to it."""
    model = Path(shutil.copytree(tiny_model("llama", layers=LAYERS), directory / f"steps-{step}"))
    weights = load_file(model / "model.safetensors")
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = weights[name] * step
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.fixture(scope="module")
def small_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_small_steps(tmp_path_factory.mktemp("models"), 0.06)


@pytest.fixture(scope="module")
def author(small_steps: Path) -> ReferenceModel:
    return ReferenceModel.load(small_steps)


GOLDEN = [
    (ids[:8].tolist(), ids[8:].tolist()) for ids in np.random.default_rng(3).integers(4, VOCAB_SIZE, (3, 32))
]  # fmt: skip
DIRECTION = np.random.default_rng(4).standard_normal(HIDDEN_SIZE)


def write(path: Path, author: ReferenceModel, *taps: str, **said: object) -> Path:
    fields = {"name": "probe", "version": "1", "golden": GOLDEN} | said
    weight = np.random.default_rng(4).standard_normal(len(taps) * HIDDEN_SIZE)
    write_probe(path, linear_probe(weight), author, taps=taps, **fields)
    return path


def saying(file: Path, *taps: str) -> Path:
    """The same file after somebody wrote other taps into its manifest, and into its graph's inputs."""
    probe = read_probe_file(file)
    model = onnx.load_from_string(probe.graph)
    renamed = dict(zip(map(str, probe.manifest.taps), taps, strict=True))
    for value in model.graph.input:
        value.name = renamed.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    write_probe_file(file, model, probe.manifest.model_copy(update={"inputs": tuple(map(TapInput.parse, taps))}))
    return file


def refusal(model: Path, file: Path, dtype: str) -> ProbeRefused:
    with pytest.raises(ProbeRefused) as refused:
        Engine.load(str(model), [file], dtype=dtype)
    return refused.value


# ---------------------------------------------------------------------------------------------------------------- the place is told


@pytest.mark.parametrize(
    ("hook", "dtype"),
    [*(("resid_post", dtype) for dtype in DTYPES), *((hook, "bfloat16") for hook in ("resid_pre", "attn_out", "mlp_out"))],
)
def test_the_right_layer_is_served_and_its_neighbours_are_not(
    small_steps: Path, author: ReferenceModel, tmp_path: Path, hook: str, dtype: str
) -> None:
    file = write(tmp_path / "probe.onnx", author, f"{hook}.{STATED}")
    Engine.load(str(small_steps), [file], dtype=dtype)
    for layer in (STATED - 2, STATED - 1, STATED + 1):
        shutil.copy(file, tmp_path / "edited.onnx")
        assert refusal(small_steps, saying(tmp_path / "edited.onnx", f"{hook}.{layer}"), dtype).field.startswith("golden")


def test_a_neighbours_scores_are_named(small_steps: Path, author: ReferenceModel, tmp_path: Path) -> None:
    file = write(tmp_path / "probe.onnx", author, f"resid_post.{STATED}", tolerance=Tolerance(bfloat16=0.5))
    refused = refusal(small_steps, saying(file, f"resid_post.{STATED + 1}"), "bfloat16")
    assert f"those of golden.neighbours at resid_post.{STATED + 1}" in str(refused)


def test_what_a_dtype_cannot_tell_is_served_in_float32_only(tmp_path: Path) -> None:
    model = with_small_steps(tmp_path, 0.002)
    file = write(tmp_path / "probe.onnx", ReferenceModel.load(model), f"resid_post.{STATED}")
    Engine.load(str(model), [file])
    refused = refusal(model, file, "bfloat16")
    assert refused.field == "golden.neighbours"
    assert "bfloat16 is too coarse to tell whether resid_post.6 is read" in refused.found
    assert "serve it in float32" in refused.expected
    Engine.load(str(model), [file], dtype="bfloat16", accept_mismatch=["probe"])


def test_without_neighbours_a_wide_tolerance_is_refused(small_steps: Path, author: ReferenceModel, tmp_path: Path) -> None:
    file = write(tmp_path / "probe.onnx", author, f"resid_post.{STATED}")
    probe = read_probe_file(file)
    golden = probe.manifest.golden.model_copy(update={"neighbours": ()})
    write_probe_file(file, onnx.load_from_string(probe.graph), probe.manifest.model_copy(update={"golden": golden}))
    Engine.load(str(small_steps), [file])
    assert "Write the file again, or serve it in float32" in refusal(small_steps, file, "bfloat16").expected
    wide = golden.model_copy(update={"tolerance": Tolerance(float32=0.1)})
    write_probe_file(file, onnx.load_from_string(probe.graph), probe.manifest.model_copy(update={"golden": wide}))
    assert refusal(small_steps, file, "float32").field == "golden.neighbours"


@pytest.mark.parametrize("tokens", [-1, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_the_token_beside_are_refused(
    small_steps: Path, author: ReferenceModel, tmp_path: Path, tokens: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that change little from token to token, so that the tolerance alone would let them pass."""
    from probescore_server.backbone.base import Activations
    from probescore_server.probes.scoring import batch_scorer

    file = tmp_path / "probe.onnx"
    running_mean(golden=GOLDEN, tolerance=Tolerance(float32=0.1, bfloat16=0.5, float16=0.5)).write(tmp_path, author).rename(file)
    Engine.load(str(small_steps), [file], dtype=dtype)
    made = batch_scorer.BatchScorer.__init__

    def beside(self, info, probes, special_ids, rollouts, forest, activations, wanted) -> None:  # type: ignore[no-untyped-def]
        rows = {}
        for tap, found in activations.rows.items():
            rows[tap] = found.clone()
            for index, start in activations.starts.items():
                stop = start + len(forest.segments[index].token_ids)
                read = (torch.arange(start, stop) + tokens).clip(start, stop - 1)
                rows[tap][start:stop] = found[read]
        made(self, info, probes, special_ids, rollouts, forest, Activations(rows, activations.starts), wanted)

    monkeypatch.setattr(batch_scorer.BatchScorer, "__init__", beside)
    assert refusal(small_steps, file, dtype).field.startswith("golden")


# --------------------------------------------------------------------------------------------------------------- every kind of probe


def places(file: Path) -> list[str]:
    return [str(neighbour) for neighbour in read_probe_file(file).manifest.golden.neighbours]


@pytest.mark.parametrize(
    ("taps", "expected"),
    [
        (["resid_pre.0"], ["resid_pre.1"]),
        (["resid_pre.11"], ["resid_pre.10", "resid_post.11"]),
        (["resid_post.0"], ["resid_pre.0", "resid_post.1"]),
        (["resid_post.11"], ["resid_post.10", "final_norm"]),
        (["final_norm"], ["resid_post.11"]),
        (["attn_out.0"], ["attn_out.1"]),
        (["mlp_out.11"], ["mlp_out.10"]),
        (
            ["resid_post.6", "final_norm"],
            ["resid_post.5, resid_post.11", "resid_post.5, final_norm", "resid_post.6, resid_post.11", "resid_post.7, final_norm"],
        ),
    ],
    ids=str,
)
def test_the_places_beside_a_tap(author: ReferenceModel, tmp_path: Path, taps: list[str], expected: list[str]) -> None:
    stated = ", ".join(taps)
    file = write(tmp_path / "probe.onnx", author, *taps)
    assert places(file) == [*expected, f"{stated} one token earlier", f"{stated} one token later"]


def test_a_model_of_one_block_has_no_places_beyond_it() -> None:
    (tap,) = [TapInput.parse("attn_out.0")]
    assert neighbouring_places([tap], 1) == [((tap,), -1), ((tap,), 1)]
    (tap,) = [TapInput.parse("resid_pre.0")]
    assert [str(taps[0].tap) for taps, _ in neighbouring_places([tap], 1)] == ["resid_post.0", "resid_pre.0", "resid_pre.0"]


KINDS: dict[str, Callable[..., object]] = {
    "follow-up": lambda: linear(follow_up=FollowUp(token_ids=(5, 6, 7)), golden=GOLDEN),
    "special tokens left out of pooling": lambda: pooled_mean(
        exclude_special_tokens=True, golden=[(prompt, [*completion, 2, completion[0]]) for prompt, completion in GOLDEN]
    ),
    "pooling that sees the prompt": lambda: pooled_mean(sees_prompt=True, golden=GOLDEN),
    "causal that sees the prompt": lambda: running_mean(sees_prompt=True, golden=GOLDEN),
    "no prompt": lambda: linear(golden=[([], completion) for _, completion in GOLDEN]),
    "single tokens": lambda: linear(golden=[([], completion[:1]) for _, completion in GOLDEN]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_probe_is_served_where_its_author_read(load: Callable[..., Engine], kind: str) -> None:
    for dtype in ("float32", "bfloat16"):
        load(KINDS[kind](), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_taps_are_told_each_alone(small_steps: Path, author: ReferenceModel, tmp_path: Path, dtype: str) -> None:
    file = write(tmp_path / "probe.onnx", author, "resid_post.6", "mlp_out.3", "final_norm")
    Engine.load(str(small_steps), [file], dtype=dtype)
    for taps in (
        ("resid_post.5", "mlp_out.3", "final_norm"),
        ("resid_post.6", "mlp_out.4", "final_norm"),
        ("resid_post.6", "mlp_out.3", "resid_post.11"),
    ):
        shutil.copy(file, tmp_path / "edited.onnx")
        assert refusal(small_steps, saying(tmp_path / "edited.onnx", *taps), dtype).field.startswith("golden")


def test_a_tap_without_weight_may_be_read_anywhere(small_steps: Path, author: ReferenceModel, tmp_path: Path) -> None:
    file = tmp_path / "probe.onnx"
    weight = np.concatenate([DIRECTION, np.zeros(HIDDEN_SIZE)])
    write_probe(file, linear_probe(weight), author, name="probe", version="1", taps=["resid_post.6", "resid_post.2"], golden=GOLDEN)
    for dtype in DTYPES:
        Engine.load(str(small_steps), [file], dtype=dtype)


def test_places_whose_scores_are_not_finite_are_left_out(small_steps: Path, author: ReferenceModel, tmp_path: Path) -> None:
    """The author's code was not made for what is there; a worker that read there would have no scores either."""
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 18]> probe (float[n, {HIDDEN_SIZE}] x) => (float[n, 1] scores) '
        "{ axes = Constant<value_ints = [1]>() scores = ReduceSum<keepdims = 1>(x, axes) }"
    )
    model.graph.input[0].name = model.graph.node[1].input[0] = "resid_post.11"
    seen: list[int] = []

    def score(inputs: dict[str, np.ndarray]) -> np.ndarray:
        seen.append(1)
        total = inputs["resid_post.11"].sum(axis=1)
        return total if len(seen) != 3 else np.full_like(total, np.inf)

    probe = write_probe(
        tmp_path / "probe.onnx", onnx_probe(model, score, unit=ScoreUnit.VALUE), author, name="p", version="1", taps=["resid_post.11"],
        golden=GOLDEN[:1],
    )  # fmt: skip
    golden = probe.manifest.golden
    assert [str(neighbour) for neighbour in golden.neighbours] == [
        "resid_post.10",
        "resid_post.11 one token earlier",
        "resid_post.11 one token later",
    ]
    assert [(str(entry), entry.reason) for entry in golden.left_out] == [("final_norm", "not_finite")]
    for dtype in DTYPES:
        Engine.load(str(small_steps), [tmp_path / "probe.onnx"], dtype=dtype)


def test_a_file_that_was_written_without_neighbours_keeps_its_digest() -> None:
    file = Path(__file__).parents[1] / "probes" / "written-without-neighbours.onnx"
    assert read_probe_file(file).manifest.golden.neighbours == ()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"inputs": [{"hook": "final_norm"}, {"hook": "final_norm"}]}, "golden.neighbours[0].inputs"),
        ({"tokens": 2}, "golden.neighbours[0].tokens"),
        ({"differences": [[[1.0]]]}, "golden.neighbours[0].differences"),
        ({"differences": []}, "golden.neighbours[0].differences"),
    ],
    ids=str,
)
def test_neighbours_that_do_not_fit_the_golden_scores_are_refused(
    author: ReferenceModel, tmp_path: Path, change: dict[str, object], field: str
) -> None:
    from probescore_server.probes.format.manifest import METADATA_KEY

    file = write(tmp_path / "probe.onnx", author, "resid_post.6")
    model = onnx.load(file)
    (entry,) = model.metadata_props
    content = json.loads(entry.value)
    content["golden"]["neighbours"][0] |= change
    del model.metadata_props[:]
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(content))
    onnx.save(model, file)
    with pytest.raises(ProbeRefused) as refused:
        read_probe_file(file)
    assert refused.value.field == field


def test_a_place_comes_once(author: ReferenceModel, tmp_path: Path) -> None:
    probe: ProbeFile = read_probe_file(write(tmp_path / "probe.onnx", author, "resid_post.6"))
    golden = probe.manifest.golden
    twice = golden.model_copy(update={"neighbours": (golden.neighbours[0], golden.neighbours[0])})
    with pytest.raises(ProbeRefused, match="each place once"):
        write_probe_file(tmp_path / "probe.onnx", onnx.load_from_string(probe.graph), probe.manifest.model_copy(update={"golden": twice}))


def test_one_difference_however_large_hides_no_neighbour(small_steps: Path, author: ReferenceModel, tmp_path: Path) -> None:
    file = write(tmp_path / "probe.onnx", author, f"resid_post.{STATED}")
    probe = read_probe_file(file)
    huge = [
        neighbour.model_copy(update={"differences": (((3e38,), *neighbour.differences[0][1:]), *neighbour.differences[1:])})
        for neighbour in probe.manifest.golden.neighbours
    ]
    golden = probe.manifest.golden.model_copy(update={"neighbours": tuple(huge)})
    write_probe_file(file, onnx.load_from_string(probe.graph), probe.manifest.model_copy(update={"golden": golden}))
    Engine.load(str(small_steps), [file], dtype="bfloat16")
    for layer in (STATED - 1, STATED + 1):
        shutil.copy(file, tmp_path / "edited.onnx")
        assert refusal(small_steps, saying(tmp_path / "edited.onnx", f"resid_post.{layer}"), "bfloat16").field.startswith("golden")


# ------------------------------------------------------------------------------------------------------- whatever the neighbours say


def with_neighbours(file: Path, change: Callable[[tuple[Neighbour, ...]], tuple[Neighbour, ...]]) -> Path:
    """The same file after somebody changed its neighbours, and sealed it again."""
    probe = read_probe_file(file)
    golden = probe.manifest.golden.model_copy(update={"neighbours": change(probe.manifest.golden.neighbours)})
    write_probe_file(file, onnx.load_from_string(probe.graph), probe.manifest.model_copy(update={"golden": golden}))
    return file


def differing_by(value: float, neighbour: Neighbour) -> Neighbour:
    differences = tuple(tuple(tuple(value for _ in row) for row in case) for case in neighbour.differences)
    return neighbour.model_copy(update={"differences": differences})


FAR = TapInput.parse("resid_post.0")
UNTOLD: dict[str, Callable[[tuple[Neighbour, ...]], tuple[Neighbour, ...]]] = {
    **{f"only the last, off by {value:g}": lambda every, v=value: (differing_by(v, every[-1]),) for value in (0.0, 50.0, 1e30, 3e38)},
    **{
        f"every layer off by {value:g}": lambda every, v=value: (*(differing_by(v, each) for each in every[:-2]), *every[-2:])
        for value in (0.0, 1e30, 3e38)
    },
    "only a place far away": lambda every: (differing_by(100.0, every[0].model_copy(update={"inputs": (FAR,)})),),
    "a place far away too": lambda every: (*every, differing_by(100.0, every[0].model_copy(update={"inputs": (FAR,)}))),
    "only the tokens": lambda every: every[-2:],
    "only the layers": lambda every: every[:-2],
    "all but one layer": lambda every: every[1:],
    "none": lambda every: (),
}


@pytest.mark.parametrize("change", UNTOLD)
def test_neighbours_that_do_not_tell_the_layer_are_refused(small_steps: Path, author: ReferenceModel, tmp_path: Path, change: str) -> None:
    file = with_neighbours(write(tmp_path / "probe.onnx", author, f"resid_post.{STATED}"), UNTOLD[change])
    Engine.load(str(small_steps), [file])
    refused = refusal(small_steps, file, "bfloat16")
    assert refused.field == "golden.neighbours"
    assert "Write the file again, or serve it in float32" in refused.expected
    assert refusal(small_steps, saying(file, f"resid_post.{STATED + 1}"), "bfloat16").field.startswith("golden")


def test_a_tap_farther_off_than_its_neighbours_is_refused(small_steps: Path, author: ReferenceModel, tmp_path: Path) -> None:
    """Though what is read there is neither what the neighbours have nor, in a dtype this coarse, far from what is due."""
    file = write(tmp_path / "probe.onnx", author, f"resid_post.{STATED}")
    for layer in (STATED - 3, STATED - 2, STATED + 2, STATED + 3):
        shutil.copy(file, tmp_path / "edited.onnx")
        assert refusal(small_steps, saying(tmp_path / "edited.onnx", f"resid_post.{layer}"), "bfloat16").field.startswith("golden")


def test_places_that_a_model_does_not_have_are_named(author: ReferenceModel, tmp_path: Path) -> None:
    """As of a model whose reference says one block more than it has."""
    longer = replace(author, reference=author.reference.model_copy(update={"num_hidden_layers": LAYERS + 1}))
    golden = read_probe_file(write(tmp_path / "probe.onnx", longer, "mlp_out.11")).manifest.golden
    assert [(str(entry), entry.reason) for entry in golden.left_out] == [("mlp_out.12", "no_such_tap")]
    assert str(golden.neighbours[0]) == "mlp_out.10"


def test_a_file_without_places_left_out_keeps_its_digest(author: ReferenceModel, tmp_path: Path) -> None:
    manifest = read_probe_file(write(tmp_path / "probe.onnx", author, f"resid_post.{STATED}")).manifest
    content = manifest.model_dump(mode="json")
    assert content["golden"].pop("left_out") == []
    assert manifest_digest(Manifest.model_validate_json(json.dumps(content))) == manifest.manifest_sha256
