"""Scores labelled rollouts with probes as they are served: by an engine in this process, or by a running server."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from probescore import Calibration, CompletionScores, CompletionStatus, ProbeInfo, Reduction, RolloutGroup, Text
from probescore.types import Chat, named_probe, score_keys
from probescore_server.cli.common.connection import connected
from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import say
from probescore_server.cli.common.progress import RolloutProgress
from probescore_server.cli.labelled_lines import read_labelled_file
from probescore_server.cli.steps import CheckSteps
from probescore_server.hub_probes import local_file

if TYPE_CHECKING:
    from probescore_probes.fitting.labelled_rollouts import Example, LabelledRollout

Data = Annotated[str, typer.Argument(help="A file of labelled rollouts.", show_default=False)]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="The model that serves probe files in this process: a directory, or an id on the Hugging Face hub.",
        show_default=False,
    ),
]
Server = Annotated[
    str,
    typer.Option(
        "--server",
        "-a",
        help="The address of a running server, in place of a model: probes are then names.",
        show_default=False,
        metavar="ADDRESS",
    ),
]
Revision = Annotated[str, typer.Option("--revision", help="The branch, tag or commit of a model on the hub.", show_default=False)]
Dtype = Annotated[str, typer.Option("--dtype", help="The dtype of the model: float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="The device, such as cpu or cuda:0.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings.")]
Positive = Annotated[
    str | None, typer.Option("--positive", help="The label that stands for the behaviour.", show_default=False, metavar="LABEL")
]
ReductionName = Annotated[
    str | None,
    typer.Option(
        "--reduction", "-r", help="The reduction, such as mean, max or topk_mean(8); each probe's own by default.", show_default=False
    ),
]
Column = Annotated[str, typer.Option("--label", help="The label that is judged, of a probe with several.", show_default=False)]
SpecialTokens = Annotated[
    bool,
    typer.Option("--special-tokens/--no-special-tokens", help="Whether prompts that are texts get the tokenizer's special tokens (BOS)."),
]
Seed = Annotated[int, typer.Option("--seed", help="The seed of the intervals' random draws.")]


@dataclass(frozen=True, eq=False)
class Judged:
    """A probe with its score of every labelled rollout.

    Attributes:
        probe: the probe's description by the engine or server.
        reduction: how token scores become one score of a rollout; ``None`` for a probe that pools by itself.
        label: name of the score column.
        scores: one score for each rollout, ``(n,)``, in the unit of the probe.
    """

    probe: ProbeInfo
    reduction: Reduction | None
    label: str
    scores: NDArray[np.float64]

    @property
    def thresholds(self) -> tuple[Calibration, ...]:
        """Returns those thresholds of a probe that hold for the reduction (such as the mean) and the label by which rollouts
        were scored.
        """
        return tuple(each for each in self.probe.calibrations if each.reduction == self.reduction and each.label in ("", self.label))


@dataclass(frozen=True, eq=False)
class JudgedRollouts:
    """Labelled rollouts with their scores by one or more probes.

    Attributes:
        probes: each probe with its scores, in the order in which probes were asked for.
        positive: whether each rollout has the behaviour, ``(n,)`` bool.
        groups: number of each rollout's group, ``(n,)``: the group that the data name, else that of all rollouts with its prompt.
        slices: name of each rollout's slice (part of the data), empty for none.
        where: the line of each rollout in its file, for messages.
        dtype: dtype of the model that scored.
        examples: the rollouts as token ids; empty if a server tokenised them.
        bos_token_id: id of the token that begins a sequence (BOS); ``None`` if there is none, or a server tokenised the rollouts.
        generation_prompt_ids: the ids with which the model's chat template ends a prompt; empty without one, or if a server tokenised the
            rollouts.
    """

    probes: tuple[Judged, ...]
    positive: NDArray[np.bool_]
    groups: NDArray[np.int64]
    slices: tuple[str, ...]
    where: tuple[str, ...]
    dtype: str
    examples: tuple[Example, ...]
    bos_token_id: int | None = None
    generation_prompt_ids: tuple[int, ...] = ()


def read_held_out(data: str, splits: Sequence[str], *, positive: str | None, special_tokens: bool) -> list[LabelledRollout]:
    """Reads the rollouts of a file that name no split, or one of ``splits``, and prints on stderr how many rollouts were left out.

    Raises:
        ValueError: the data are no file, have no such rollouts, or only some of them name their group.
    """
    if data == "-":
        raise ValueError("-: standard input cannot be named by a digest of its bytes, which goes into the result; give a file")
    every = read_labelled_file(data, positive=positive, add_special_tokens=special_tokens)
    kept = [rollout for rollout in every if rollout.split is None or rollout.split in splits]
    if not kept:
        raise ValueError(f"{data}: there are no labelled rollouts in it" + (f" of split {' or '.join(splits)}" if every else ""))
    if len(kept) < len(every):
        say(f"{len(every) - len(kept)} rollouts of other splits than {' and '.join(splits)} are left out")
    unnamed = [rollout.where for rollout in kept if rollout.group is None]
    if 0 < len(unnamed) < len(kept):
        raise ValueError(f"{unnamed[0]}: no group, where other lines have one; give every line one, or none")
    return kept


def data_digest(data: str) -> str:
    """Returns the SHA-256 digest of a file's bytes as ``sha256:…``; of a folder, that of all its files in the order of their names."""
    files = sorted(path for path in Path(data).rglob("*") if path.is_file()) if Path(data).is_dir() else [Path(data)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return f"sha256:{digest.hexdigest()}"


def judged_rollouts(
    probes: Sequence[str],
    rollouts: Sequence[LabelledRollout],
    *,
    model: str,
    server: str = "",
    revision: str,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    reduction: str | None,
    label: str,
) -> JudgedRollouts:
    """Scores labelled rollouts with probes, and shows the steps on standard error.

    Args:
        probes: names of probes that the server has loaded, or paths of probe files if no server is given.
        rollouts: the labelled rollouts.
        model: model that an engine in this process loads if no server is given.
        server: address of a running server; empty for an engine in this process.
        revision: branch, tag or commit of a model on the Hugging Face hub.
        dtype: dtype of the engine's model.
        device: device of the engine's model, such as ``cuda:0``.
        trust_remote_code: whether to run Python code that the model brings.
        reduction: reduction of token scores to one score of a rollout; ``None`` for the probe's own.
        label: label that is judged; empty for a probe with a single one.

    Raises:
        ValueError: a rollout cannot be scored, or an option is wrong; the message names the line or the option.
    """
    if server:
        return _judged_by_server(probes, rollouts, server, reduction=reduction, label=label)
    with CheckSteps(new_console(stderr=True)) as steps:
        return _judged_by_engine(
            probes,
            rollouts,
            model=model,
            revision=revision,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            reduction=reduction,
            label=label,
            report=steps.begin,
        )


def _judged_by_engine(
    files: Sequence[str],
    rollouts: Sequence[LabelledRollout],
    *,
    model: str,
    revision: str,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    reduction: str | None,
    label: str,
    report: Callable[[str], None],
) -> JudgedRollouts:
    """Scores rollouts with probe files, served by an engine in this process.

    Raises:
        ValueError: a rollout cannot be scored, or an option is wrong; the message names the line or the option.
    """
    from probescore_probes.fitting.labelled_rollouts import tokenised
    from probescore_server.engine.engine import Engine
    from probescore_server.probes.format.probe_file import read_probe_file

    files = [local_file(file, say) for file in files]
    keys = _differing([read_probe_file(file).manifest.key for file in files])
    engine = Engine.load(model, files, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code, report=report)
    served = {probe.key: probe for probe in engine.info.probes}
    probes = [served[key] for key in keys]
    _column_of_each(probes, label)
    examples = tokenised(rollouts, engine)
    report(f"scoring {len(examples):,} rollouts")
    result = engine.score([example.rollout() for example in examples], probes=keys, reductions=_wanted(reduction))
    columns = dict(zip(keys, score_keys(result.info.probes), strict=True))
    scored = [group.completions[0] for group in result.groups]
    where = tuple(example.where for example in examples)
    spans = [0 if example.passage is None else 1 for example in examples]
    return JudgedRollouts(
        probes=tuple(_judged(probe, columns[probe.key], scored, spans, where, reduction, label) for probe in probes),
        positive=np.array([example.positive for example in examples], bool),
        groups=_groups([example.group for example in examples], [example.prompt_ids.tobytes() for example in examples]),
        slices=tuple(example.slice for example in examples),
        where=where,
        dtype=engine.info.dtype,
        examples=tuple(examples),
        bos_token_id=engine.info.bos_token_id,
        generation_prompt_ids=engine.generation_prompt_ids(),
    )


def _judged_by_server(
    names: Sequence[str], rollouts: Sequence[LabelledRollout], address: str, *, reduction: str | None, label: str
) -> JudgedRollouts:
    """Scores rollouts with probes that a running server has loaded.

    Raises:
        ValueError: a rollout cannot be scored, its label is about a part of the completion, or an option is wrong; the message names the
            line or the option.
    """
    for rollout in rollouts:
        if rollout.positive is None or rollout.passages or rollout.token_labels is not None:
            raise ValueError(f"{rollout.where}: labels of parts of a completion are judged in this process alone; give --model and files")
    asked = [RolloutGroup(rollout.prompt, [replace(rollout.completion, spans=(), follow_ups=())]) for rollout in rollouts]
    scored: list[CompletionScores | None] = [None] * len(asked)
    with connected(address, 0) as client:
        info = client.get_server_info()
        loaded = client.list_probes()
        probes = [_named(name, loaded) for name in names]
        keys = _differing([probe.key for probe in probes])
        _column_of_each(probes, label)
        columns: dict[str, str] = {}
        with RolloutProgress(len(asked)) as progress:
            for answer in client.score_stream(asked, probes=keys, reductions=_wanted(reduction)):
                columns = columns or dict(zip(keys, score_keys(answer.info.probes), strict=True))
                scored[answer.group_index] = answer.scores
                progress.advance()
    where = tuple(rollout.where for rollout in rollouts)
    every = [each for each in scored if each is not None]
    return JudgedRollouts(
        probes=tuple(_judged(probe, columns[probe.key], every, [0] * len(every), where, reduction, label) for probe in probes),
        positive=np.array([rollout.positive for rollout in rollouts], bool),
        groups=_groups([rollout.group for rollout in rollouts], [_prompt(rollout.prompt) for rollout in rollouts]),
        slices=tuple(rollout.slice for rollout in rollouts),
        where=where,
        dtype=", ".join(sorted({worker.dtype for worker in info.workers})),
        examples=(),
    )


def check_source(model: str, server: str) -> None:
    """Raises ``ValueError`` unless exactly one of the options ``--model`` and ``--server`` is given."""
    if bool(model) == bool(server):
        raise ValueError("give either --model, to serve probe files in this process, or --server, to ask a server for its probes")


def _judged(
    probe: ProbeInfo,
    column: str,
    scored: Sequence[CompletionScores],
    spans: Sequence[int],
    where: Sequence[str],
    reduction: str | None,
    label: str,
) -> Judged:
    chosen = probe.labels.index(label) if label else 0
    scores = np.empty(len(scored))
    for index, (completion, span) in enumerate(zip(scored, spans, strict=True)):
        if completion.status is not CompletionStatus.OK:
            raise ValueError(f"{where[index]}: cannot be scored: {completion.status_message or completion.status.value}; leave it out")
        value = completion.scores[column].at(span, 0, chosen)
        if value is None:
            raise ValueError(f"{where[index]}: no token of it counts for {probe.key}; leave it out, or change its mask")
        scores[index] = value
    used = probe.default_reduction
    if used is not None and reduction is not None:
        used = Reduction.parse(reduction)
    return Judged(probe, used, probe.labels[chosen], scores)


def _wanted(reduction: str | None) -> tuple[Reduction, ...]:
    return () if reduction is None else (Reduction.parse(reduction),)


def _column_of_each(probes: Sequence[ProbeInfo], label: str) -> None:
    for probe in probes:
        known = ", ".join(probe.labels)
        if label and label not in probe.labels:
            raise ValueError(f"--label: {probe.key} has no label {label!r}; it has {known}")
        if not label and len(probe.labels) > 1:
            raise ValueError(f"--label: {probe.key} has {len(probe.labels)} labels; say which one is judged: {known}")


def _named(name: str, served: Sequence[ProbeInfo]) -> ProbeInfo:
    found = named_probe(name, served)
    if found is None:
        known = ", ".join(probe.key for probe in served) or "none"
        raise ValueError(f"{name}: no such probe at the server; it has {known}")
    return found


def _differing(keys: list[str]) -> list[str]:
    for index, key in enumerate(keys):
        if key in keys[:index]:
            raise ValueError(f"{key}: given for the second time; give each probe once")
    return keys


def _groups(names: Sequence[str | None], prompts: Sequence[bytes]) -> NDArray[np.int64]:
    """Numbers the groups of rollouts in order of appearance.

    Rollouts of one group have the same group name or, without names, the same prompt; a rollout with an empty prompt is a group of its own.
    """
    numbers: dict[str | bytes | int, int] = {}
    keys = [name if name is not None else prompts[index] or index for index, name in enumerate(names)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def _prompt(prompt: Text | Chat | Sequence[int]) -> bytes:
    if isinstance(prompt, Text):
        return prompt.text.encode()
    return repr(prompt).encode() if isinstance(prompt, Chat) else np.asarray(prompt, np.int32).tobytes()
