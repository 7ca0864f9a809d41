"""Labelled rollouts as rows of Parquet files and of folders of ``save_to_disk``: what is read, and what is refused by file and row."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from probescore.types import Chat, Text
from probescore_probes.fitting.labelled_rollouts import Passage
from probescore_server.cli.labelled_lines import read_labelled_file
from probescore_server.cli.rollout_lines import LineError

TWO = [
    {"prompt": "a", "completion": "b", "label": 1, "group": "x", "weight": 2.0, "note": b"\x00"},
    {"prompt": "a", "completion": "c", "label": 0, "group": "y", "weight": 1.0, "note": b"\x01"},
]


def read(path, positive=None):
    return read_labelled_file(str(path), positive=positive, add_special_tokens=True)


def written(path: Path, rows, metadata=None) -> Path:
    """A Parquet file, or the folder that ``Dataset.save_to_disk`` writes."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_pylist(rows)
    table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)}) if metadata else table
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=1)
        return path
    path.mkdir(parents=True)
    names = [f"data-{number:05}-of-00002.arrow" for number in range(2)]
    for name, part in zip(names, (table.slice(0, 1), table.slice(1)), strict=True):
        with pa.OSFile(str(path / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(part)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train"}))
    return path


def dict_of(path: Path, **splits) -> Path:
    path.mkdir()
    (path / "dataset_dict.json").write_text(json.dumps({"splits": [*splits]}))
    for name, rows in splits.items():
        written(path / name, rows)
    return path


@pytest.mark.parametrize("name", ["data.parquet", "folder"])
def test_rows_are_read_as_lines_would_be(name, tmp_path):
    found = read(written(tmp_path / name, TWO))
    assert [(each.prompt, each.completion.tokens, each.positive, each.group, each.weight) for each in found] == [
        (Text("a", True), "b", True, "x", 2.0),
        (Text("a", True), "c", False, "y", 1.0),
    ]
    assert [each.where for each in found] == [f"{tmp_path / name}[0]", f"{tmp_path / name}[1]"]


def test_a_field_that_is_null_in_a_row_is_not_there(tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": "a", "name": None}],
            "completion": {"text": "a b", "ids": None, "mask": None},
            "label": True,
        },
        {
            "prompt": [{"role": "user", "content": "b", "name": None}],
            "completion": {"text": None, "ids": [5, 6], "mask": [1, 0], "token_labels": [None, True]},
            "label": None,
        },
        {
            "prompt": [{"role": "user", "content": "c", "name": None}],
            "completion": {"text": "a b", "span_labels": [{"start": 0, "end": 1, "label": True}]},
        },
        {"prompt": [{"role": "user", "content": "d", "name": None}], "completion": {"text": "a"}, "label": None},
    ]
    found = read(written(tmp_path / "data.parquet", rows))
    assert [each.prompt for each in found] == [Chat.of([{"role": "user", "content": name}]) for name in "abc"]
    assert found[0].completion.mask is None
    assert found[1].completion.mask == [True, False]
    assert found[1].token_labels == (None, True)
    assert found[2].passages == (Passage(0, 1, True),)


def test_several_completions_of_one_prompt_are_one_row(tmp_path):
    found = read(written(tmp_path / "data.parquet", [{"prompt": [1, 2], "completions": [[3], [4, 5]], "label": [True, False]}]))
    assert [(list(each.completion.tokens), each.positive) for each in found] == [([3], True), ([4, 5], False)]


def test_the_splits_of_a_folder_are_the_splits_of_its_rows(tmp_path):
    folder = dict_of(tmp_path / "all", train=TWO, validation=TWO, test=TWO, ood=TWO)
    found = read(folder)
    assert [each.split for each in found] == [name for name in ("train", "calibration", "test", "ood") for _ in TWO]
    assert found[-1].where == f"{folder}['ood'][1]"
    assert [each.split for each in read(dict_of(tmp_path / "one", train=TWO))] == [None, None]
    with pytest.raises(LineError, match=r"split 'extra'; give only train, .*, or one split alone"):
        read(dict_of(tmp_path / "strange", train=TWO, extra=TWO))
    with pytest.raises(LineError, match=r"\['test'\]\[0\]: split: 'train' in a row of the split test; leave out the column"):
        read(dict_of(tmp_path / "both", train=TWO, test=[{**row, "split": "train"} for row in TWO]))


def test_the_index_of_a_class_is_its_name_where_the_behaviour_is_named(tmp_path):
    metadata = {"info": {"features": {"label": {"names": ["truth", "lie"], "_type": "ClassLabel"}}}}
    path = written(tmp_path / "data.parquet", TWO, metadata)
    assert [each.positive for each in read(path)] == [True, False]
    assert [each.positive for each in read(path, positive="lie")] == [True, False]
    assert [each.positive for each in read(path, positive="truth")] == [False, True]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"label": 3}, "label: expected true or false, or 1 or 0, got 3"),
        ({"label": float("nan")}, "label: expected a finite number, got nan"),
        ({"label": b"\xff"}, "label: expected text, a number, true, false or null, got"),
        ({"prompt": None}, "prompt: missing"),
        ({"prompt": b"\xff"}, "prompt: expected text, a list of token ids or a list of messages, got"),
        ({"weight": -1.0}, "weight: expected a number from 1e-06 to 1e\\+06, got -1.0"),
        ({"group": 1.5}, "group: expected text or a whole number, got 1.5"),
        ({"mask": [1]}, "mask: belongs into the completion"),
        ({"completion": {"text": "a", "ids": [1]}}, "completion: give either text or ids"),
    ],
)
def test_what_is_wrong_names_its_row_and_field(row, says, tmp_path):
    path = written(tmp_path / "data.parquet", [{"prompt": "a", "completion": "b", "label": 1, **row}])
    with pytest.raises(LineError, match=r"data.parquet\[0\]: " + says):
        read(path)


def test_a_folder_that_is_none_or_is_damaged_is_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(LineError, match=r"empty: a folder without dataset_dict.json or state.json"):
        read(tmp_path / "empty")
    (tmp_path / "empty" / "state.json").write_text("{")
    with pytest.raises(LineError, match=r"state.json: not JSON"):
        read(tmp_path / "empty")
    for entry in ("../../secret.arrow", "..", 3, ""):
        (tmp_path / "empty" / "state.json").write_text(json.dumps({"_data_files": [{"filename": entry}]}))
        with pytest.raises(LineError, match="expected a name in the same folder"):
            read(tmp_path / "empty")
    (tmp_path / "empty" / "state.json").write_text(json.dumps({"_data_files": [], "_indices_data_files": [{"filename": "a"}]}))
    with pytest.raises(LineError, match="flatten_indices"):
        read(tmp_path / "empty")
    (tmp_path / "empty" / "state.json").unlink()
    (tmp_path / "empty" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(LineError, match=r"\['train'\]: no state.json in it"):
        read(tmp_path / "empty")


@pytest.mark.parametrize("name", ["data.parquet", "folder"])
def test_a_damaged_file_is_refused_in_one_line(name, tmp_path):
    path = written(tmp_path / name, TWO)
    file = path if path.is_file() else path / "data-00000-of-00002.arrow"
    for damaged in (b"", b"not a table", file.read_bytes()[:-40]):
        file.write_bytes(damaged)
        with pytest.raises(LineError, match=r": cannot be read: [^\n]*; is it whole\?$"):
            read(path)


def test_a_parquet_file_without_the_library_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(LineError, match=r"data.parquet: reading it needs pyarrow: pip install 'probescore\[data\]'"):
        read(tmp_path / "data.parquet")


def test_what_datasets_writes_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "completion": datasets.Value("string"), "label": datasets.ClassLabel(names=["truth", "lie"])}
    )
    rows = [{"prompt": f"p{number}", "completion": "c", "label": number % 2} for number in range(10)]
    data = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"train": data.select([3, 1, 2]), "test": data.filter(lambda row: row["label"] == 1)}).save_to_disk(tmp_path / "a")
    found = read(tmp_path / "a", positive="lie")
    assert [each.prompt.text for each in found] == ["p3", "p1", "p2", "p1", "p3", "p5", "p7", "p9"]
    assert [each.positive for each in found] == [True, True, False, *[True] * 5]
    data.shuffle(seed=1).save_to_disk(tmp_path / "b", num_shards=3)
    assert {each.prompt.text for each in read(tmp_path / "b")} == {row["prompt"] for row in rows}
    data.to_parquet(tmp_path / "c.parquet")
    assert [each.positive for each in read(tmp_path / "c.parquet", positive="truth")] == [row["label"] == 0 for row in rows]
