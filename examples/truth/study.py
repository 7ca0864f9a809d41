"""``make truth-study``: what a probe of truth is worth, measured anew and put beside what was measured before it was built.

The first run reads 2,400 statements in seven forms and keeps what it read; one that was stopped goes on where it was. Tables are written as
Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from reading import FORMS, USUAL, Read, in_a_chat, read
from statements import FACTUAL, NEGATED, Line, lines_by_topic
from topics import Fact, facts_by_topic
from transformers import AutoTokenizer

from probescore_audit import auroc
from probescore_probes.fitting.activation_pass import read_tokens
from probescore_probes.fitting.baselines import RANDOM_DIRECTIONS, bag_of_words
from probescore_probes.fitting.cross_validation import Candidate, Labels, held_out_auroc, held_out_scores
from probescore_probes.fitting.kinds import fit_kind
from probescore_probes.fitting.linear_kinds import DIFFERENCE_OF_MEANS, LDA, LOGISTIC, USUAL_STRENGTHS, Linear, fit_linear
from probescore_probes.fitting.pooling_kinds import MEAN_OF_SIGMOIDS, MLP
from probescore_probes.fitting.splits import folds
from probescore_probes.fitting.token_kinds import ATTENTION
from probescore_server import Engine

BLOCK = "resid_post.14"
STRENGTH = 1e-2
FALSE_ALARMS = 0.05
TOLERANCE = 0.03
FEW, DRAWS = 40, 20

Indices = NDArray[np.int64]
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        what: what was measured.
        predicted: between which numbers it was said to lie, both the same if one was said; ``None`` = nothing was said.
        measured: what came out: one number, or the least and the most.
        tolerance: how far outside it may be.
    """

    what: str
    predicted: tuple[float, float] | None
    measured: tuple[float, ...]
    tolerance: float = TOLERANCE

    @property
    def verdict(self) -> str:
        if self.predicted is None:
            return ""
        low, high = self.predicted[0] - self.tolerance, self.predicted[1] + self.tolerance
        return "yes" if all(low - 1e-9 <= round(number, 3) <= high + 1e-9 for number in self.measured) else "**no**"

    def __str__(self) -> str:
        predicted = "" if self.predicted is None else _span(self.predicted)
        return f"| {self.what} | {predicted} | {_span(self.measured)} | {self.verdict} |"


def _span(numbers: Sequence[float]) -> str:
    return "–".join(f"{number:.3f}".replace("0.", ".", 1) if abs(number) < 10 else f"{number:,.0f}" for number in dict.fromkeys(numbers))


class Study:
    """All statements, what was read of them, and the ways to judge a probe."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.directory, self._folder = model, folder
        topics = lines_by_topic()
        self.lines: list[Line] = [line for lines in topics.values() for line in lines]
        self.topic = np.array([line["slice"] for line in self.lines])
        self.false = np.array([line["label"] for line in self.lines])
        groups = np.unique([line["group"] for line in self.lines], return_inverse=True)[1].astype(np.int64)
        self.labels = Labels(self.false, groups, np.ones(len(groups)))
        self.factual = np.flatnonzero(np.isin(self.topic, FACTUAL))

    @cache  # noqa: B019 - one study a process
    def read(self, form: str = USUAL) -> Read:
        """What was read of all statements, or, in another form than the usual one, of the factual ones: these come first."""
        lines = self.lines if form == USUAL else self.lines[: len(self.factual)]
        return read(form, lines, self.directory, self._folder)

    @cached_property
    def known(self) -> NDArray[np.bool_]:
        """Whether the model finds the true answer to the statement's prompt likelier than the false one, ``(statements,)``."""
        surprise = self.read().surprise
        by_prompt: dict[tuple[str, str], dict[bool, float]] = {}
        keys = [(line["slice"], line["prompt"]) for line in self.lines]
        for key, false, value in zip(keys, self.false, surprise, strict=True):
            by_prompt.setdefault(key, {})[bool(false)] = value
        return np.array([by_prompt[key][True] > by_prompt[key][False] for key in keys])

    @cached_property
    def ids(self) -> list[NDArray[np.int32]]:
        tokenizer = AutoTokenizer.from_pretrained(self.directory)
        return [np.array(tokenizer(line["completion"], add_special_tokens=False).input_ids, np.int32) for line in self.lines]

    def of(self, topic: str) -> Indices:
        return np.flatnonzero(self.topic == topic)

    def fitted(self, rows: NDArray[np.float32], on: Indices, kind: str = LOGISTIC, strength: float = STRENGTH) -> Linear:
        return fit_linear(kind, rows[on], self.false[on], self.labels.weights[on], strength)

    def auroc(self, scores: Scores, of: Indices) -> float:
        return auroc(scores, self.false[of])

    def transferred(self, on: Indices, to: Indices) -> float:
        """AUROC on some statements of a probe that was fitted on others."""
        rows = self.read().at(BLOCK)
        return self.auroc(self.fitted(rows, on).score(rows[to]), to)

    def held_out(
        self,
        rows: NDArray[np.float32],
        of: Indices,
        *,
        kind: str = LOGISTIC,
        strength: float = STRENGTH,
        served: NDArray[np.float32] | None = None,
    ) -> float:
        """AUROC over held-out groups; with ``served``, what is held out is scored on these rows."""
        some, judged = self.labels.of(of), rows if served is None else served

        def fit(fitted: Indices) -> Callable[[Indices], Scores]:
            probe = self.fitted(rows, of[fitted], kind, strength)
            return lambda indices: probe.score(judged[of[indices]])

        return held_out_auroc(held_out_scores(fit, some), some).value

    @cached_property
    def split(self) -> tuple[Indices, Indices, Indices]:
        """The factual statements as three parts of whole groups: 60% to fit on, 20% to find thresholds on, 20% to test on."""
        some = self.labels.of(self.factual)
        parts = [self.factual[held_out] for _, held_out in folds(some.groups, some.positive, 5, 0)]
        return np.concatenate(parts[:3]), parts[3], parts[4]


# -------------------------------------------------------------------------------------------------------------------------- the tables


def knowledge(study: Study) -> Iterator[Row]:
    """How often the model finds the true answer of two the likelier one."""
    said = {"capitals": .97, "elements": .93, "antonyms": .94, "cities": .91, "languages": .86, "continents": .81, "currencies": .75,
            "arithmetic": .57, "comparison": .43}  # fmt: skip
    for topic, share in said.items():
        yield Row(topic, (share, share), (float(study.known[study.of(topic)].mean()),))


def words(study: Study) -> Iterator[Row]:
    """What a bag of words of the answers tells: nothing, if the data are made right."""
    tokenizer = AutoTokenizer.from_pretrained(study.directory)
    random, deranged, paired = [], [], []
    for topic, facts in facts_by_topic().items():
        if topic in FACTUAL:
            for found, make in ((random, _drawn_at_random), (deranged, _deranged)):
                answers, false, groups = make(facts)
                ids = [np.array(tokenizer(f" {answer}.").input_ids, np.int32) for answer in answers]
                found.append(bag_of_words(ids, Labels(false, groups, np.ones(len(false)))).value)
            some = study.of(topic)
            paired.append(bag_of_words([study.ids[index] for index in some], study.labels.of(some)).value)
    yield Row("false answers drawn at random (D1)", (0.66, 0.80), (min(random), max(random)))
    yield Row("answers deranged, the subject is the group (D2)", (0.01, 0.09), (min(deranged), max(deranged)))
    yield Row("pairs swap their answers, the pair is the group", (0.5, 0.5), (min(paired), max(paired)))


def _drawn_at_random(facts: Sequence[Fact]) -> tuple[list[str], NDArray[np.bool_], Indices]:
    """Each fact, and a false answer out of all names that there are, of which most are nobody's true answer here."""
    random = np.random.default_rng(0)
    values = sorted({fact.value for fact in facts})
    answers = []
    for fact in facts:
        false = [value for value in values if not fact.allows(value)]
        answers += [fact.value, false[int(random.integers(len(false)))]]
    return answers, np.tile([False, True], len(facts)), np.repeat(np.arange(len(facts)), 2)


def _deranged(facts: Sequence[Fact]) -> tuple[list[str], NDArray[np.bool_], Indices]:
    answers = [answer for fact, other in zip(facts, [*facts[1:], facts[0]], strict=True) for answer in (fact.value, other.value)]
    return answers, np.tile([False, True], len(facts)), np.repeat(np.arange(len(facts)), 2)


def layers(study: Study) -> Iterator[Row]:
    """Held-out AUROC on the six factual topics, block by block."""
    found = study.read()
    curves = {pool: [study.held_out(found.at(tap, pool), study.factual) for tap in found.taps] for pool in ("mean", "last")}
    mean = curves["mean"]
    yield Row("`mean`, blocks 9–19: least and most", (0.94, 0.96), (min(mean[9:20]), max(mean[9:20])))
    known = study.factual[study.known[study.factual]]
    yield Row("`mean`, block 14, only facts that the model knows", None, (study.held_out(found.at(BLOCK), known),))
    for topic in FACTUAL:
        yield Row(f"`mean`, block 14, fitted and held out on {topic}", None, (study.held_out(found.at(BLOCK), study.of(topic)),))
    last = found.at(BLOCK, "last")
    yield Row("`last`, block 14", (0.918, 0.918), (curves["last"][14],))
    yield Row("`last`, block 14, served as `mean`", (0.703, 0.703), (study.held_out(last, study.factual, served=found.at(BLOCK)),))
    statements = study.read("statements").at(BLOCK)
    yield Row("`mean`, block 14, statements in place of answers", None, (study.held_out(statements, study.factual),))
    for block in range(0, 30, 3):
        yield Row(f"block {block}: `mean`, `last`", None, (mean[block], curves["last"][block]))
    yield Row("block 29: `mean`, `last`", None, (mean[29], curves["last"][29]))
    far = study.of("antonyms")
    for pool in ("mean", "last"):
        outside = [study.auroc(study.fitted(found.at(tap, pool), study.factual).score(found.at(tap, pool)[far]), far) for tap in found.taps]
        best = int(np.argmax(curves[pool]))
        lost = max(outside[9:20]) - outside[best]
        yield Row(f"`{pool}`: lost on antonyms by taking the best block ({best})", (0.0, 0.01) if pool == "mean" else None, (lost,))
    random = np.random.default_rng(0)
    reported = []
    for _ in range(DRAWS):
        few = np.isin(study.labels.groups, random.permutation(np.unique(study.labels.groups[study.factual]))[: FEW // 4])
        reported.append(max(study.held_out(found.at(tap), np.flatnonzero(few)) for tap in found.taps))
    yield Row(f"best of 30 blocks, chosen on {FEW} statements: reported", (0.85, 0.985), (min(reported), max(reported)))


def kinds(study: Study) -> Iterator[Row]:
    """Kinds of probes at block 14: held-out AUROC on the six topics, and on antonyms, which are far from them."""
    found, factual = study.read(), study.factual
    rows, far = found.at(BLOCK), study.of("antonyms")
    for kind, strength, title, said, said_far in (
        (LOGISTIC, STRENGTH, "logistic, C = .01", 0.939, 0.63),
        (LOGISTIC, 1.0, "logistic, C = 1", 0.909, None),
        (DIFFERENCE_OF_MEANS, STRENGTH, "difference of means", 0.877, 0.80),
        (LDA, USUAL_STRENGTHS[LDA], "LDA", 0.935, None),
    ):
        yield Row(title, (said, said), (study.held_out(rows, factual, kind=kind, strength=strength),))
        if strength < 1.0:
            outside = (study.auroc(study.fitted(rows, factual, kind, strength).score(rows[far]), far),)
            yield Row(f"{title}, on antonyms", None if said_far is None else (said_far, said_far), outside)
    across = [f"resid_post.{block}" for block in (4, 8, 12, 16, 20, 24)]
    some = study.labels.of(factual)
    engine = Engine.load(str(study.directory), taps=[BLOCK])
    tokens = read_tokens(engine, in_a_chat([study.lines[index] for index in factual], engine), [BLOCK])
    for kind, taps, said in (
        (MLP, [BLOCK], 0.945),
        (ATTENTION, [BLOCK], 0.935),
        (MEAN_OF_SIGMOIDS, across, 0.946),
    ):
        table = found.table(factual, taps, tokens)

        def fit(fitted: Indices, kind: str = kind, table: object = table) -> Callable[[Indices], Scores]:
            return fit_kind(kind, table, some, fitted, Candidate(BLOCK, "mean", STRENGTH)).score

        yield Row(kind.replace("-", " "), (said, said), (held_out_auroc(held_out_scores(fit, some), some).value,))


def baselines(study: Study) -> Iterator[Row]:
    """What needs no probe."""
    found, capitals = study.read(), study.of("capitals")
    rows = found.at(BLOCK)
    yield Row("−log P(answer), six topics", (0.753, 0.753), (study.auroc(found.surprise[study.factual], study.factual),))
    yield Row("−log P(answer), capitals", (0.927, 0.927), (study.auroc(found.surprise[capitals], capitals),))
    for topic in FACTUAL[1:]:
        yield Row(f"−log P(answer), {topic}", None, (study.auroc(found.surprise[study.of(topic)], study.of(topic)),))
    yield Row("the probe, fitted and held out on capitals", (0.940, 0.940), (study.held_out(rows, capitals),))
    scaled = (rows[study.factual] - rows[study.factual].mean(0)) / rows[study.factual].std(0)
    random = scaled @ np.random.default_rng(0).standard_normal((rows.shape[1], RANDOM_DIRECTIONS))
    best = max(abs(study.auroc(column, study.factual) - 0.5) for column in random.T) + 0.5
    yield Row("best of 20 random directions", (0.641, 0.641), (best,))


def elsewhere(study: Study) -> Iterator[Row]:
    """Fitted on some topics, judged on others, at block 14."""
    well = [topic for topic in FACTUAL if topic != "currencies"]
    between = [study.transferred(study.of(one), study.of(other)) for one in well for other in well if one != other]
    yield Row("from one factual topic to another", (0.83, 0.98), (min(between), max(between)))
    to_currencies = [study.transferred(study.of(one), study.of("currencies")) for one in well]
    yield Row("from one factual topic to currencies", (0.61, 0.78), (min(to_currencies), max(to_currencies)))
    left_out = {topic: study.transferred(np.setdiff1d(study.factual, study.of(topic)), study.of(topic)) for topic in FACTUAL}
    for topic, value in left_out.items():
        yield Row(f"from the other five to {topic}", None, (value,))
    controls = [study.transferred(study.factual, study.of(topic)) for topic in ("arithmetic", "comparison")]
    yield Row("from all six to arithmetic and comparison", (0.52, 0.63), (min(controls), max(controls)))
    negated = [
        *(study.transferred(study.of(topic), study.of(NEGATED)) for topic in ("capitals", "cities")),
        study.transferred(study.factual, study.of(NEGATED)),
    ]
    yield Row("from capitals, cities, all six to negated cities", (0.04, 0.13), (min(negated), max(negated)))


def thresholds(study: Study) -> Iterator[Row]:
    """A threshold for 5% false alarms on the six topics, and what it does elsewhere."""
    rows = study.read().at(BLOCK)
    fit, calibration, test = study.split
    probe = study.fitted(rows, fit)

    def rate(of: Indices, threshold: float) -> float:
        return float((probe.score(rows[of[~study.false[of]]]) >= threshold).mean())

    held_out = _threshold(probe, rows, calibration[~study.false[calibration]])
    yield Row("on the six topics, held out", None, (rate(test, held_out),))
    of_topics = [rate(np.intersect1d(np.concatenate([calibration, test]), study.of(topic)), held_out) for topic in FACTUAL]
    yield Row("on each of the six topics", (0.01, 0.10), (min(of_topics), max(of_topics)))
    yield Row("on antonyms", (0.11, 0.11), (rate(study.of("antonyms"), held_out),))
    yield Row("on arithmetic", (0.90, 0.90), (rate(study.of("arithmetic"), held_out),))
    in_sample = _threshold(probe, rows, fit[~study.false[fit]])
    yield Row(
        "found on what was fitted on: on the six topics, held out", (0.077, 0.077), (rate(np.concatenate([calibration, test]), in_sample),)
    )


def dilution(study: Study) -> Iterator[Row]:
    """A bland sentence after the answer, by block: ranking and threshold of a probe that was fitted without."""
    fit, calibration, test = study.split
    found, filled = study.read(), study.read("answers with a sentence after them")
    alarms, recalls, rankings, healed = {}, {}, {}, {}
    true, false = test[~study.false[test]], test[study.false[test]]
    for block in range(9, 20):
        rows, other = found.at(f"resid_post.{block}"), filled.at(f"resid_post.{block}")
        probe = study.fitted(rows, fit)
        threshold = _threshold(probe, rows, calibration[~study.false[calibration]])
        alarms[block] = float((probe.score(other[true]) >= threshold).mean())
        recalls[block] = float((probe.score(other[false]) >= threshold).mean())
        rankings[block] = study.auroc(probe.score(other[test]), test)
        both = fit_linear(LOGISTIC, np.concatenate([rows[fit], other[fit]]), np.tile(study.false[fit], 2), np.ones(2 * len(fit)), STRENGTH)
        known = calibration[~study.false[calibration]]
        at = float(np.quantile(np.concatenate([both.score(rows[known]), both.score(other[known])]), 1 - FALSE_ALARMS))
        healed[block] = float((both.score(other[true]) >= at).mean())
    most, least = max(alarms, key=alarms.__getitem__), min(alarms, key=alarms.__getitem__)
    yield Row(f"false alarms at a 5% threshold, block {most}", (0.99, 0.99), (alarms[most],))
    yield Row(f"false alarms at a 5% threshold, block {least}", (0.0, 0.0), (alarms[least],))
    yield Row(f"recall there, block {least}", (0.15, 0.15), (recalls[least],))
    yield Row("AUROC, blocks 9–19: median", (0.89, 0.89), (float(np.median(list(rankings.values()))),))
    yield Row("AUROC, blocks 9–19: least and most", None, (min(rankings.values()), max(rankings.values())))
    yield Row("false alarms if fitted and calibrated on both, blocks 9–19", None, (min(healed.values()), max(healed.values())))


def forms(study: Study) -> Iterator[Row]:
    """Fitted in one form of the prompt, served in another, at block 14, held out by groups."""
    chat, bos, plain = (study.read(form).at(BLOCK) for form in (USUAL, "BOS, no template", "no template"))
    yield Row("chat template, and so served", None, (study.held_out(chat, study.factual),))
    yield Row("fitted with the chat template, served without", (0.60, 0.60), (study.held_out(chat, study.factual, served=plain),))
    alone = study.read("no prompt").at(BLOCK)
    yield Row("fitted with it, served on the statement alone", (0.60, 0.60), (study.held_out(chat, study.factual, served=alone),))
    yield Row("fitted without it, served with", None, (study.held_out(plain, study.factual, served=chat),))
    yield Row("BOS, and so served", None, (study.held_out(bos, study.factual),))
    yield Row("fitted with BOS, served without", (0.70, 0.70), (study.held_out(bos, study.factual, served=plain),))
    yield Row("fitted without BOS, served with", None, (study.held_out(plain, study.factual, served=bos),))


def sink(study: Study) -> Iterator[Row]:
    """Position 0 without a prompt or BOS, at block 14."""
    whole, masked = study.read("no prompt"), study.read("no prompt, position 0 masked")
    place = whole.taps.index(BLOCK)
    yield Row("norm at position 0 / the median norm", (22_700 / 180, 22_700 / 180), (float(np.nanmedian(whole.sink[:, place])),), 40)
    for title, found, said in (("read", whole, 0.510), ("masked", masked, 0.742)):
        value = study.held_out(found.at(BLOCK), study.factual, kind=DIFFERENCE_OF_MEANS)
        yield Row(f"difference of means, position 0 {title}", (said, said), (value,))
        yield Row(f"logistic, position 0 {title}", None, (study.held_out(found.at(BLOCK), study.factual),))


def _threshold(probe: Linear, rows: NDArray[np.float32], negatives: Indices) -> float:
    return float(np.quantile(probe.score(rows[negatives]), 1 - FALSE_ALARMS))


TABLES: Mapping[str, Callable[[Study], Iterable[Row]]] = {
    "What the model knows: log P(true) > log P(false)": knowledge,
    "Words alone": words,
    "Layers": layers,
    "Kinds, block 14": kinds,
    "Baselines": baselines,
    "Out of distribution": elsewhere,
    "Thresholds": thresholds,
    "Dilution": dilution,
    "Prompt form": forms,
    "Attention sink": sink,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("truth/model"), help="the model (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("truth/study"), help="where everything is left (default: %(default)s)")
    parser.add_argument("--tables", nargs="*", default=[], help="only tables whose titles contain one of these")
    options = parser.parse_args()
    study = Study(options.model, options.folder)
    for form in FORMS:
        study.read(form)
    with (options.folder / "tables.md").open("w", encoding="utf-8") as file:
        for title, table in TABLES.items():
            if options.tables and not any(part in title for part in options.tables):
                continue
            heading = f"\n## {title}\n\n| | predicted | measured | within {TOLERANCE:.2f} |\n|---|---|---|---|"
            for text in (heading, *map(str, table(study))):
                print(text, flush=True)
                print(text, file=file, flush=True)


if __name__ == "__main__":
    main()
