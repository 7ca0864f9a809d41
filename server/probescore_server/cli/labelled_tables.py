"""Reads the rows of Parquet files, and of folders that Hugging Face's ``save_to_disk`` wrote, as the objects that lines of JSON would hold.

A folder is read as the Arrow files that it consists of, without the library that wrote it, and without running any of its code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probescore_server.cli.rollout_lines import LineError

_COLUMNS = (
    *("prompt", "completion", "completions", "label", "group", "split", "slice", "weight"),
    *("mask", "spans", "follow_ups"),  # to be refused, as in a line
)
_OF_DATASET, _OF_DICT = "state.json", "dataset_dict.json"
_SPLITS = {
    **{name: name for name in ("train", "calibration", "test", "ood")},
    **dict.fromkeys(("validation", "valid", "val", "dev"), "calibration"),
}


@dataclass(frozen=True)
class LabelledRow:
    """A row of a table.

    Attributes:
        where: the file and the row, as one would index it, such as ``data.parquet[12]`` or ``folder['train'][12]``.
        content: values by column, without those that are null.
    """

    where: str
    content: dict[str, Any]


def is_table(name: str) -> bool:
    """Returns whether a name is that of a folder or of a Parquet file."""
    return Path(name).is_dir() or Path(name).suffix.lower() == ".parquet"


def read_rows(name: str, *, names_of_label: bool) -> Iterator[LabelledRow]:
    """Reads the rows of a Parquet file, or of a folder that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote.

    The names of a ``DatasetDict`` become the column ``split`` if there are several: ``validation`` is ``calibration``.

    Args:
        name: path of the file or folder.
        names_of_label: whether a label that is stored as the index of a class is read as the name of the class.

    Raises:
        LineError: the folder is not one that ``save_to_disk`` wrote, a file is damaged, or its columns are not known; names the file.
        OSError: the file cannot be read.
    """
    path = Path(name)
    if not path.is_dir():
        yield from _rows(path, name, names_of_label, None)
    elif (path / _OF_DICT).is_file():
        splits = _entry(path / _OF_DICT, "splits")
        for split in splits:
            if len(splits) > 1 and split not in _SPLITS:
                raise LineError(f"{name}: split {split!r}; give only {', '.join(_SPLITS)}, or one split alone")
            yield from _dataset(path / split, f"{name}[{split!r}]", names_of_label, _SPLITS[split] if len(splits) > 1 else None)
    elif (path / _OF_DATASET).is_file():
        yield from _dataset(path, name, names_of_label, None)
    else:
        raise LineError(
            f"{name}: a folder without {_OF_DICT} or {_OF_DATASET}; give one that save_to_disk wrote, or a .parquet or .jsonl file"
        )


def _dataset(folder: Path, where: str, names_of_label: bool, split: str | None) -> Iterator[LabelledRow]:
    if not (folder / _OF_DATASET).is_file():
        raise LineError(f"{where}: no {_OF_DATASET} in it; copy the whole folder that save_to_disk wrote")
    state = _entry(folder / _OF_DATASET)
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise LineError(f"{where}: rows in another order than in its files; call flatten_indices() and save it again")
    first = 0
    for entry in _entry(folder / _OF_DATASET, "_data_files"):
        file = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(file, str) or not file.endswith(".arrow") or Path(file).name != file:
            raise LineError(f"{where}: {_OF_DATASET}: a file of the data is {file!r:.60}; expected a name in the same folder")
        for row in _rows(folder / file, where, names_of_label, split, first):
            yield row
            first += 1


def _rows(path: Path, where: str, names_of_label: bool, split: str | None, first: int = 0) -> Iterator[LabelledRow]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise LineError(f"{where}: reading it needs pyarrow: pip install 'probescore[data]'; or give lines of JSON") from None
    with path.open("rb") as file:
        try:
            if path.suffix.lower() == ".parquet":
                table = pq.ParquetFile(file)
                names = [name for name in table.schema_arrow.names if name in _COLUMNS]
                schema, batches = table.schema_arrow, table.iter_batches(columns=names)
            else:
                stream = pa.ipc.open_stream(file)
                names = [name for name in stream.schema.names if name in _COLUMNS]
                schema, batches = stream.schema, (batch.select(names) for batch in stream)
            classes = _classes(schema.metadata) if names_of_label else ()
            for batch in batches:
                for content in batch.to_pylist():
                    yield LabelledRow(f"{where}[{first}]", _row(content, classes, split, f"{where}[{first}]"))
                    first += 1
        except (pa.ArrowException, OSError) as error:
            raise LineError(f"{where}: cannot be read: {str(error).splitlines()[0]}; is it whole?") from None


def _row(content: dict[str, Any], classes: tuple[str, ...], split: str | None, where: str) -> dict[str, Any]:
    known: dict[str, Any] = _without_nulls(content)
    if split is not None:
        if known.get("split", split) != split:
            raise LineError(f"{where}: split: {known['split']!r:.60} in a row of the split {split}; leave out the column")
        known["split"] = split
    label = known.get("label")
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(classes):
        known["label"] = classes[label]
    return known


def _without_nulls(content: Any) -> Any:  # noqa: ANN401 - a value of any JSON type
    """Returns a value without the null entries of its objects: a table has a value for every field of an object, if only null."""
    if isinstance(content, dict):
        return {key: _without_nulls(value) for key, value in content.items() if value is not None}
    return [_without_nulls(entry) for entry in content] if isinstance(content, list) else content


def _classes(metadata: dict[bytes, bytes] | None) -> tuple[str, ...]:
    """Returns the names of the classes of the column ``label``, if it holds indices of classes (``ClassLabel``)."""
    try:
        names = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]["label"]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _entry(file: Path, key: str = "") -> Any:  # noqa: ANN401 - a value of any JSON type
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LineError(f"{file}: not JSON: {error}") from None
    if not isinstance(content, dict) or (key and not isinstance(content.get(key), list)):
        raise LineError(f"{file}: expected an object" + (f" with a list {key!r}" if key else ""))
    return content[key] if key else content
