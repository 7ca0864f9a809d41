"""Reads labelled rollouts, the input of ``probescore probes fit DATA``, from lines of JSON or from the rows of a table.

A line, or a row, has the fields that ``probescore score`` reads, and a ``label`` for each completion. Beside the prompt, it may have
``group``, ``split``, ``slice`` and ``weight``. A completion may have ``span_labels`` (``[[start, end, label], …]``, or objects with these
names; positions count characters in a text, and tokens in a list of ids) and ``token_labels`` (one for each token id, ``null`` = none).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from probescore.types import Chat, Completion, Text
from probescore_server.cli.labelled_tables import is_table, read_rows
from probescore_server.cli.rollout_lines import Label, LineError, opened_lines, parsed_line, rollout_group

if TYPE_CHECKING:
    from probescore_probes.fitting.labelled_rollouts import LabelledRollout, Passage

_SPLITS = ("train", "calibration", "test", "ood")
_OF_LINE = ("group", "split", "slice", "weight")
_SPAN = ("start", "end", "label")
_OF_COMPLETION = ("span_labels", "token_labels")


def read_labelled_file(name: str, *, positive: str | None, add_special_tokens: bool) -> list[LabelledRollout]:
    """Reads every labelled rollout of a file; completions without a label are left out.

    Args:
        name: path of a file of JSON lines, of a Parquet file or of a folder that ``save_to_disk`` wrote; ``-`` for standard input.
        positive: the label that stands for the behaviour to be found, as text; ``None`` = labels are true and false, or 1 and 0.
        add_special_tokens: whether prompts given as text get the tokenizer's special tokens (BOS).

    Raises:
        LineError: a line or a row is not a labelled rollout; the message names the file, the line and the field.
        OSError: the file cannot be read.
    """
    if is_table(name):
        return [
            rollout
            for row in read_rows(name, names_of_label=positive is not None)
            for rollout in _located(row.content, row.where, positive, add_special_tokens)
        ]
    with opened_lines(name) as lines:
        source = "standard input" if name == "-" else name
        return list(read_labelled_lines(lines, source, positive=positive, add_special_tokens=add_special_tokens))


def read_labelled_lines(lines: Iterable[str], source: str, *, positive: str | None, add_special_tokens: bool) -> Iterator[LabelledRollout]:
    """Reads labelled rollouts from lines of JSON; arguments and errors are those of ``read_labelled_file``."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{source}:{number}"
            try:
                content = parsed_line(line)
            except LineError as error:
                raise LineError(f"{where}: {error}") from None
            yield from _located(content, where, positive, add_special_tokens)


def _located(content: object, where: str, positive: str | None, add_special_tokens: bool) -> Iterator[LabelledRollout]:
    try:
        yield from _rollouts(content, where, positive, add_special_tokens)
    except LineError as error:
        raise LineError(f"{where}: {error}") from None


def _rollouts(content: object, where: str, positive: str | None, add_special_tokens: bool) -> Iterator[LabelledRollout]:
    from probescore_probes.fitting.labelled_rollouts import LabelledRollout

    plain, own = without_labels(content)
    group = rollout_group(plain, add_special_tokens)
    assert isinstance(content, dict)  # noqa: S101 - else rollout_group had refused it
    of_line = _of_line(content)
    several = "completions" in content
    for index, (completion, label) in enumerate(zip(group.completions, group.labels, strict=True)):
        assert isinstance(completion, Completion)  # noqa: S101 - as rollout_group makes them
        field = f"completions[{index}]" if several else "completion"
        if completion.follow_ups:
            raise LineError(f"{field}.follow_ups: a probe is not fitted on follow-ups; put what should be read into the completion")
        is_text = isinstance(completion.tokens, str)
        passages = _span_labels(own[index].get("span_labels", []), f"{field}.span_labels", positive)
        token_labels = own[index].get("token_labels")
        if token_labels is not None:
            if is_text or not isinstance(token_labels, list):
                raise LineError(f"{field}.token_labels: expected a list beside ids, one label for each; a text takes span_labels")
            token_labels = tuple(
                None if entry is None else is_positive(entry, f"{field}.token_labels[{place}]", positive)
                for place, entry in enumerate(token_labels)
            )
        whole = None if label is None else is_positive(label, f"{field}.label" if several else "label", positive)
        if whole is None and not passages and token_labels is None:
            continue
        prompt = group.prompt if isinstance(group.prompt, Text | Chat) else [int(token) for token in group.prompt]
        yield LabelledRollout(
            prompt, completion, whole, f"{where} {field}" if several else where, passages=passages, token_labels=token_labels, **of_line
        )


def without_labels(content: object) -> tuple[object, list[dict[str, Any]]]:
    """Splits the content of a line of labelled rollouts into the fields that ``probescore score`` reads, and each completion's labels of
    spans and tokens.
    """
    if not isinstance(content, dict):
        return content, []
    completions = content.get("completions", [content["completion"]] if "completion" in content else [])
    if not isinstance(completions, list):
        return content, []
    own = [{key: entry[key] for key in _OF_COMPLETION if key in entry} if isinstance(entry, dict) else {} for entry in completions]
    plain = [
        {key: value for key, value in entry.items() if key not in _OF_COMPLETION} if isinstance(entry, dict) else entry
        for entry in completions
    ]
    kept = {key: value for key, value in content.items() if key not in _OF_LINE}
    return {**kept, "completions": plain} if "completions" in content else {**kept, **({"completion": plain[0]} if plain else {})}, own


def _of_line(content: dict[str, Any]) -> dict[str, Any]:
    from probescore_probes.fitting.labelled_rollouts import WEIGHTS

    found: dict[str, Any] = {}
    if content.get("group") is not None:
        if isinstance(content["group"], bool) or not isinstance(content["group"], str | int):
            raise LineError(f"group: expected text or a whole number, got {content['group']!r:.60}")
        found["group"] = str(content["group"])
    if content.get("split") is not None:
        if content["split"] not in _SPLITS:
            raise LineError(f"split: expected one of {', '.join(_SPLITS)}, got {content['split']!r:.60}")
        found["split"] = content["split"]
    if content.get("slice") is not None:
        if not isinstance(content["slice"], str):
            raise LineError(f"slice: expected text, got {content['slice']!r:.60}")
        found["slice"] = content["slice"]
    if content.get("weight") is not None:
        weight = content["weight"]
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not WEIGHTS[0] <= weight <= WEIGHTS[1]:
            raise LineError(f"weight: expected a number from {WEIGHTS[0]:g} to {WEIGHTS[1]:g}, got {weight!r:.60}")
        found["weight"] = float(weight)
    return found


def _span_labels(content: object, field: str, positive: str | None) -> tuple[Passage, ...]:
    from probescore_probes.fitting.labelled_rollouts import Passage

    if not isinstance(content, list):
        raise LineError(f"{field}: expected a list of [start, end, label], got {content!r:.60}")
    passages = []
    for index, entry in enumerate(content):
        if isinstance(entry, dict) and {*entry} == {*_SPAN}:
            entry = [entry[key] for key in _SPAN]
        bounds = entry[:2] if isinstance(entry, list) and len(entry) == 3 else []
        if len(bounds) != 2 or not all(isinstance(bound, int) and not isinstance(bound, bool) for bound in bounds):
            raise LineError(f"{field}[{index}]: expected [start, end, label], got {entry!r:.60}")
        passages.append(Passage(bounds[0], bounds[1], is_positive(entry[2], f"{field}[{index}]", positive)))
    return tuple(passages)


def is_positive(label: Label, field: str, positive: str | None) -> bool:
    """Returns whether a label says that the behaviour is there.

    Args:
        label: the label.
        field: name of its field, for the message.
        positive: the label that stands for the behaviour, as text; ``None`` = labels are true and false, or 1 and 0.

    Raises:
        LineError: the label is neither.
    """
    if positive is not None:
        return (str(label).lower() if isinstance(label, bool) else str(label)) == positive
    if isinstance(label, bool):
        return label
    if isinstance(label, int | float) and label in (0, 1):
        return bool(label)
    raise LineError(f"{field}: expected true or false, or 1 or 0, got {label!r:.60}; or say which label is the behaviour: --positive LABEL")
