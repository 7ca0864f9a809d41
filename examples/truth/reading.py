"""Activations of all statements in several forms, each read once and kept in files: a study that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from questions import question
from statements import Line

from probescore.types import Chat, Completion, Text
from probescore_probes import ReferenceModel
from probescore_probes.fitting.activation_pass import FINAL_NORM, ActivationTable, read_activations
from probescore_probes.fitting.labelled_rollouts import Example, LabelledRollout, tokenised
from probescore_probes.fitting.robustness import FILLER
from probescore_server import Engine

POOLS = ("mean", "last")
USUAL = "answers in a chat"
MIDDLE = tuple(f"resid_post.{layer}" for layer in range(9, 20))
"""What is read of other forms than the usual one: where probes of truth read best."""


def in_a_chat(lines: Sequence[Line], engine: Engine) -> list[Example]:
    """A user asks, the answer is what follows: ``What is the capital of France?`` and ``Paris.``"""
    return _examples(lines, engine, lambda stem: Chat.of([{"role": "user", "content": question(stem)}]), str.lstrip)


def without_template(lines: Sequence[Line], engine: Engine) -> list[Example]:
    """Question and answer as plain text: no template, and no BOS."""
    return _examples(lines, engine, lambda stem: Text(question(stem)))


def with_bos(lines: Sequence[Line], engine: Engine) -> list[Example]:
    bos = np.array([engine.info.bos_token_id], np.int32)
    return [replace(each, prompt_ids=np.concatenate([bos, each.prompt_ids])) for each in without_template(lines, engine)]


def with_filler(lines: Sequence[Line], engine: Engine) -> list[Example]:
    filler = engine.encode_completion(FILLER)
    examples = in_a_chat(lines, engine)
    return [replace(each, completion_ids=np.concatenate([each.completion_ids, filler]).astype(np.int32)) for each in examples]


def as_statements(lines: Sequence[Line], engine: Engine) -> list[Example]:
    """As the demo has them: ``The capital of France is`` and `` Paris.``"""
    return _examples(lines, engine, Text)


def without_prompt(lines: Sequence[Line], engine: Engine) -> list[Example]:
    """The whole statement is the completion, so that position 0 is read."""
    return [
        replace(each, prompt_ids=each.prompt_ids[:0], completion_ids=np.concatenate([each.prompt_ids, each.completion_ids]))
        for each in as_statements(lines, engine)
    ]


def without_position_0(lines: Sequence[Line], engine: Engine) -> list[Example]:
    return [replace(each, mask=np.arange(len(each.completion_ids)) > 0) for each in without_prompt(lines, engine)]


def _examples(
    lines: Sequence[Line], engine: Engine, prompt: Callable[[str], Text | Chat], completion: Callable[[str], str] = str
) -> list[Example]:
    rollouts = [
        LabelledRollout(
            prompt(line["prompt"]),
            Completion(completion(line["completion"])),
            line["label"],
            str(number),
            group=line["group"],
            slice=line["slice"],
        )
        for number, line in enumerate(lines)
    ]
    return tokenised(rollouts, engine)


FORMS = {
    USUAL: in_a_chat,
    "answers with a sentence after them": with_filler,
    "no template": without_template,
    "BOS, no template": with_bos,
    "statements": as_statements,
    "no prompt": without_prompt,
    "no prompt, position 0 masked": without_position_0,
}


@dataclass(frozen=True, eq=False)
class Read:
    """What was read of all statements in one form.

    Attributes:
        taps: names of the taps, in their order.
        pooled: ``(statements, taps, poolings, width)`` float32, mapped from its file.
        surprise: −log P of the answer, in nats, ``(statements,)``; NaN in other forms than the usual one.
        sink: norm of position 0 divided by the median norm, ``(statements, taps)``; NaN where position 0 is not read.
    """

    taps: tuple[str, ...]
    pooled: NDArray[np.float32]
    surprise: NDArray[np.float64]
    sink: NDArray[np.float64]

    def at(self, tap: str, pool: str = "mean") -> NDArray[np.float32]:
        return np.asarray(self.pooled[:, self.taps.index(tap), POOLS.index(pool)])

    def table(
        self, chosen: NDArray[np.int64], taps: Sequence[str], tokens: Mapping[str, tuple[NDArray[np.float32], ...]] | None = None
    ) -> ActivationTable:
        """The table that fitting takes, of some statements and some taps."""
        return ActivationTable(
            tuple(taps),
            POOLS,
            {(tap, pool): self.at(tap, pool)[chosen] for tap in taps for pool in POOLS},
            self.surprise[chosen],
            np.ones(len(chosen), np.int64),
            {tap: self.sink[chosen, self.taps.index(tap)] for tap in taps},
            tokens=dict(tokens or {}),
        )


def read(form: str, lines: Sequence[Line], model: Path, folder: Path) -> Read:
    """Reads statements in one form, or takes what an earlier run has read of them."""
    digest = hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:12]  # other statements are not taken for these
    place = folder / digest / form.replace(",", "").replace(" ", "_")
    if not place.is_dir():
        table = _everything(lines, model) if form == USUAL else _middle(lines, form, model)
        draft = place.with_suffix(".part")
        draft.mkdir(parents=True, exist_ok=True)
        np.save(draft / "pooled.npy", np.stack([np.stack([table.pooled[tap, pool] for pool in POOLS], 1) for tap in table.taps], 1))
        np.save(draft / "surprise.npy", table.surprise)
        np.save(draft / "sink.npy", np.stack([table.sink[tap] for tap in table.taps], 1))
        (draft / "taps.txt").write_text("\n".join(table.taps))
        draft.rename(place)  # whole, or not there
    return Read(
        tuple((place / "taps.txt").read_text().split("\n")),
        np.load(place / "pooled.npy", mmap_mode="r"),
        np.load(place / "surprise.npy"),
        np.load(place / "sink.npy"),
    )


def _everything(lines: Sequence[Line], model: Path) -> ActivationTable:
    engine = Engine.load(str(model), taps=["resid_post.*", FINAL_NORM])
    taps = [f"resid_post.{layer}" for layer in range(engine.info.model.num_hidden_layers)]
    return read_activations(engine, ReferenceModel.load(model), in_a_chat(lines, engine), taps, POOLS)


def _middle(lines: Sequence[Line], form: str, model: Path) -> ActivationTable:
    engine = Engine.load(str(model), taps=MIDDLE)
    examples = FORMS[form](lines, engine)
    pooled = {(tap, pool): np.empty((len(examples), engine.info.model.hidden_size), np.float32) for tap in MIDDLE for pool in POOLS}
    sink = {tap: np.full(len(examples), np.nan) for tap in MIDDLE}
    for index, found in enumerate(engine.activations([example.rollout() for example in examples], MIDDLE, pool=[*POOLS, "tokens"])):
        for tap in MIDDLE:
            if not len(examples[index].prompt_ids):
                norms = np.linalg.norm(found.tokens[tap].astype(np.float64), axis=1)
                sink[tap][index] = norms[0] / np.median(norms[1:])
            for column, pool in enumerate(POOLS):
                pooled[tap, pool][index] = found.pooled[tap][0, column]
    unknown = np.full(len(examples), np.nan)
    return ActivationTable(MIDDLE, POOLS, pooled, unknown, np.ones(len(examples), np.int64), sink)
