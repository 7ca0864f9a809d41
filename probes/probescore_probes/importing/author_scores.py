"""Compares the scores of an imported probe with scores that its author's own code gave for the same rollouts, to find out whether the probe
reads the right place in the model.

A probe that reads the wrong block by one still correlates with the right probe (0.946 where it was measured), so that only the author's own
scores reveal the mistake. If the scores disagree, neighbouring taps are tried, and the error says which of them agrees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probescore.reductions import Reduction, reduce_scores
from probescore.types import ScoreUnit, TokenIds
from probescore_probes import arguments
from probescore_probes.golden import GoldenScorer
from probescore_probes.importing.imported import Array
from probescore_probes.reference import ReferenceModel
from probescore_server.errors import ProbeRefused
from probescore_server.probes.format.graph import CU_SEQLENS, POSITIONS, GraphInputs
from probescore_server.probes.format.manifest import Place, TapInput, neighbouring_places

AGREES = 0.05
"""Limits the root mean square of differences, in standard deviations of the author's scores.

Running a whole model in half precision stays below the limit; reading the wrong block by one does not.
"""

EXACT = 1e-3
_CLEARLY = 2.0
_FEWEST = 3
_SWEPT = 8
_ALL_ORDERS = 3
_FEWEST_FOR_SCALE = 8
_EXPLAINED = 16.0
_SAME_BUT_FOR_SCALE = 0.9999
_REDUCTIONS = ("mean", "last", "max", "min", "sum")


@dataclass(frozen=True, eq=False)
class AuthorScores:
    """A rollout with the scores that the author's own code gave it: of each token, or of the whole rollout.

    Attributes:
        prompt_ids: token ids of the prompt, ``(P,)``; may be empty.
        completion_ids: token ids of the completion, ``(T,)``.
        token_scores: scores of the completion's tokens, ``(T,)`` or ``(T, labels)``; ``None`` if ``score`` is given.
        score: score of the rollout, a number or ``(labels,)``; ``None`` if ``token_scores`` is given.
    """

    prompt_ids: TokenIds
    completion_ids: TokenIds
    token_scores: ArrayLike | None = None
    score: ArrayLike | None = None


@dataclass(frozen=True, eq=False)
class _Case:
    """A rollout and its author's scores as an array: ``(T, labels)`` for token scores, ``(1, labels)`` for a score of the rollout."""

    prompt: NDArray[np.int64]
    completion: NDArray[np.int64]
    expected: Array
    per_token: bool


@dataclass(frozen=True)
class _Found:
    """The result of comparing the author's scores with those of one way to read the model, such as another tap (place in the model) or with
    BOS.

    Attributes:
        off: root mean square of the differences, in standard deviations of the author's scores.
        correlation: correlation with the author's scores, of the label that correlates least.
        where: the way to read the model, in words for messages.
        remedy: how to import the probe so that it is read this way.
        unit: the unit of scores in which the two were compared.
        scale: the factor from the scores that were found to the author's, if it alone explains why they differ; ``None`` = it does not.
    """

    off: float
    correlation: float
    where: str
    remedy: str
    unit: str
    scale: float | None = None


def compared(scorer: GoldenScorer, reduction: str | None, given: Sequence[AuthorScores], file: str) -> str:
    """Checks that an imported probe gives the scores that its author's code gave.

    Args:
        scorer: scores rollouts with the imported probe on the reference model's activations.
        reduction: how token scores become one score of a rollout; ``None`` for a probe that pools.
        given: rollouts with the author's scores.
        file: name of the imported file, for messages.

    Returns:
        A sentence for the manifest: how closely the scores agree, and on how many rollouts.

    Raises:
        ValueError: the author's scores are missing, too few or all equal, or neighbouring taps (places in the model) would give the same
            scores.
        ProbeRefused: the scores disagree; the message says which tap or way of reading agrees, if one does.
    """
    cases = list(_read(given, scorer.reference, pools=reduction is None))
    labels = {case.expected.shape[1] for case in cases}
    expected = np.concatenate([case.expected for case in cases]) if len(labels) == 1 else np.zeros((0, 0))
    if len(expected) < _FEWEST or not (expected.std(axis=0) > 0).all():
        raise ValueError(
            f"author_scores: {len(expected)} scores{' that do not vary' if len(expected) >= _FEWEST else ''}; give at least {_FEWEST} that "
            "differ, with the same labels each time"
        )
    comparison = _PlaceComparison(scorer, reduction, cases, expected)
    stated = comparison.at("where it was imported to", "", [(scorer.inputs, 0)])[0]
    if stated is not None and stated.off <= AGREES:
        blocks_off = comparison.neighbours(tokens_too=False)
        # A difference that looks like rounding may also be a small mistake, which another way of reading does not make.
        others = comparison.others() if stated.off > EXACT else ()
        if any(_CLEARLY * found.off < stated.off for found in (*blocks_off, *others)):
            raise _refusal(comparison, stated, len(expected), file)
        if stated.off > EXACT and stated.scale is not None:
            raise ProbeRefused(
                file,
                "author_scores",
                f"scores off by {stated.off:.2g} of the author's standard deviation ({len(expected)} scores)",
                f"the author's, which are {stated.scale:.5g} times as far from each other: rounding leaves no such trace. Save the "
                "weights, and a standard deviation with its ddof and eps, as they were when he scored",
            )
        rival = min(blocks_off, key=lambda found: found.off, default=None)
        if rival is not None and rival.off < _CLEARLY * stated.off:
            raise ValueError(
                f"author_scores: those of {rival.where} agree as well (off by {rival.off:.2g} standard deviations, {stated.off:.2g} as "
                "imported), so that they do not tell which is right; give more of them, in float32"
            )
        exactness = "" if stated.off <= EXACT else ", as half precision gives"
        return (
            f"Agrees with its author's scores within {stated.off:.2g} of their standard deviation{exactness} "
            f"({len(expected)} scores, compared as {stated.unit})"
        )
    raise _refusal(comparison, stated, len(expected), file)


def _refusal(comparison: _PlaceComparison, stated: _Found | None, scores: int, file: str) -> ProbeRefused:
    found = "no finite scores" if stated is None else f"scores off by {stated.off:.2g} of the author's standard deviation"
    found += f" (correlation {stated.correlation:.4g}, {scores} scores)" if stated is not None else ""
    around = sorted((*comparison.neighbours(), *comparison.others()), key=lambda one: one.off)
    agreeing = [one for one in around if one.off <= AGREES]
    if agreeing:
        nearest = agreeing[0]
        return ProbeRefused(
            file, "author_scores", found, f"the author's, which are those of {nearest.where} (off by {nearest.off:.2g}): {nearest.remedy}"
        )
    if stated is not None and abs(stated.correlation) >= _SAME_BUT_FOR_SCALE:
        sign = "another sign, scale or offset" if stated.correlation < 0 else "another scale or offset"
        return ProbeRefused(
            file, "author_scores", found, f"the author's, which differ by {sign} alone: import the weights as they were when he scored"
        )
    tried = (
        f"the nearest of {len(around)} other readings is {around[0].where} (off by {around[0].off:.2g})"
        if around
        else "no other can be read"
    )
    return ProbeRefused(
        file,
        "author_scores",
        found,
        f"the author's; {tried}: check that model, template, BOS and ids are those that he used, and that the file is the "
        "probe that he ran",
    )


class _PlaceComparison:
    """Comparison of an imported probe's scores, computed from several places in the model and in several ways, with the scores that its
    author's code gave for the same rollouts.
    """

    def __init__(self, scorer: GoldenScorer, reduction: str | None, cases: Sequence[_Case], expected: Array) -> None:
        self._scorer, self._reduction = scorer, reduction
        self._cases, self._expected = cases, expected

    def at(self, where: str, remedy: str, places: Sequence[Place]) -> list[_Found | None]:
        """Compares a probe's scores with its author's if it reads at each of the given taps (places in the model): on all rollouts for one
        tap, on the first few rollouts for several taps.
        """
        return self._compare(self._scorer, places, [(where, remedy)] * len(places), self._reduction)

    def neighbours(self, *, tokens_too: bool = True) -> list[_Found]:
        """Compares a probe's scores with its author's if the probe reads one decoder block earlier or later and, if asked, one token
        earlier or later.
        """
        every = neighbouring_places(self._scorer.inputs, self._scorer.reference.reference.num_hidden_layers)
        places = [place for place in every if tokens_too or not place[1]]
        said = [(_named(place), _remedy(place)) for place in places]
        return [found for found in self._compare(self._scorer, places, said, self._reduction) if found is not None]

    def others(self) -> Iterator[_Found]:
        """Compares a probe's scores with its author's if the probe reads other places in the model, prompts with or without BOS, or centred
        activations, and if token scores are reduced in other ways.
        """
        scorer = self._scorer
        hooks = [*_other_orders(scorer.inputs), *_other_hooks(scorer.inputs, scorer.reference.reference.num_hidden_layers)]
        yield from self._found(scorer, hooks, [(_named(place), _remedy(place)) for place in hooks])
        here: list[Place] = [(scorer.inputs, 0)]
        centred = _on(scorer, lambda x: x - x.mean(axis=1, keepdims=True))
        remedy = "its author's activations were centred (TransformerLens does): take each row's mean out of the weights, and import those"
        yield from self._found(centred, here, [("activations less the mean of each row", remedy)])
        bos = scorer.reference.tokenizer.bos_token_id
        if bos is not None:
            without, within = "begin the rollouts as its author did, and served ones too", [*self._cases]
            self._cases = [replace(case, prompt=_toggled(case.prompt, bos)) for case in within]
            yield from self._found(scorer, here, [("rollouts that begin with BOS, or not, the other way round", without)])
            self._cases = within
        if self._reduction is None or any(case.per_token for case in self._cases):
            return
        for reduction in _REDUCTIONS:
            if reduction != self._reduction:
                yield from self._found(scorer, here, [(f"the reduction {reduction}", f"give reduction {reduction}")], reduction)
        pooled = _on(scorer, lambda x: np.broadcast_to(x.mean(axis=0), x.shape))
        remedy = "a nonlinear probe of single tokens is another function: fit it again so that it pools by itself"
        yield from self._found(pooled, here, [("the mean activation of the rollout", remedy)], "mean")

    def _found(
        self, scorer: GoldenScorer, places: Sequence[Place], said: Sequence[tuple[str, str]], reduction: str | None = None
    ) -> Iterator[_Found]:
        for found in self._compare(scorer, places, said, reduction or self._reduction):
            if found is not None:
                yield found

    def _compare(
        self, scorer: GoldenScorer, places: Sequence[Place], said: Sequence[tuple[str, str]], reduction: str | None
    ) -> list[_Found | None]:
        cases = self._cases if len(places) == 1 else self._cases[:_SWEPT]
        expected = np.concatenate([case.expected for case in cases])
        scores = [scorer.scores_at(case.prompt, case.completion, places) for case in cases]
        return [
            _nearest(
                [of_case[index] for of_case in scores],
                cases,
                expected,
                self._expected.std(axis=0),
                scorer.probe.unit,
                reduction,
                where,
                remedy,
            )
            for index, (where, remedy) in enumerate(said)
        ]


def _nearest(
    scores: Sequence[Array | None],
    cases: Sequence[_Case],
    expected: Array,
    scale: Array,
    unit: ScoreUnit,
    reduction: str | None,
    where: str,
    remedy: str,
) -> _Found | None:
    """Compares a probe's scores with its author's in each unit (such as logits or probabilities) that the author may have used, and returns
    the closest result.
    """
    units: dict[str, tuple[bool, bool]] = {f"a {unit.value}": (False, False)}
    if unit is not ScoreUnit.PROBABILITY:
        units |= {"a probability": (True, False), f"the probability of a reduced {unit.value}": (False, True)}
    best: _Found | None = None
    for name, (before, after) in units.items():
        rows = []
        for of_case, case in zip(scores, cases, strict=True):
            if of_case is None or not np.isfinite(of_case).all():
                return None
            values = _sigmoid(of_case) if before else of_case
            if not case.per_token and reduction is not None:
                values = reduce_scores(values.astype(np.float32), Reduction.parse(reduction))[None].astype(np.float64)
            rows.append(_sigmoid(values) if after else values)
        found = np.concatenate(rows)
        if found.shape != expected.shape:
            raise ValueError(
                f"author_scores: {expected.shape[1]} labels, and the probe gives {found.shape[1]}; give a number for each label"
            )
        off = float(np.sqrt((((found - expected) / scale) ** 2).mean()))
        only_scaled = best is not None and abs(best.correlation) >= _SAME_BUT_FOR_SCALE
        if best is None or (off < best.off and (off <= AGREES or not only_scaled)):
            best = _Found(off, _correlation(found, expected), where, remedy, name, _scale(found, expected))
    return best


def _read(given: Any, reference: ReferenceModel, *, pools: bool) -> Iterator[_Case]:  # noqa: ANN401
    for index, one in enumerate(
        arguments.sequence(given, "author_scores", "scores", "[AuthorScores(prompt_ids, completion_ids, score=0.5)]")
    ):
        name = f"author_scores[{index}]"
        arguments.of_kind(one, name, AuthorScores, "give AuthorScores(prompt_ids, completion_ids, token_scores=… or score=…)")
        prompt = arguments.token_ids(one.prompt_ids, f"{name}.prompt_ids", reference.vocabulary, may_be_empty=True)
        completion = arguments.token_ids(one.completion_ids, f"{name}.completion_ids", reference.vocabulary)
        if (one.token_scores is None) == (one.score is None):
            raise ValueError(f"{name}: give token_scores or score, one of the two")
        if one.score is not None:
            expected = arguments.numbers(one.score, f"{name}.score", "a number, or one for each label").reshape(1, -1)
            yield _Case(prompt, completion, expected, per_token=False)
            continue
        if pools:
            raise ValueError(f"{name}.token_scores: the probe pools a rollout into one score; give that as score")
        expected = arguments.numbers(one.token_scores, f"{name}.token_scores", "a number for each token of the completion")
        if expected.ndim not in (1, 2) or len(expected) != len(completion):
            raise ValueError(
                f"{name}.token_scores: shape {expected.shape} for {len(completion)} tokens of the completion; give one for each"
            )
        yield _Case(prompt, completion, expected.reshape(len(completion), -1), per_token=True)


def _other_hooks(inputs: tuple[TapInput, ...], num_hidden_layers: int) -> list[Place]:
    if len(inputs) != 1:
        return []
    (stated,) = inputs
    layer = num_hidden_layers - 1 if stated.layer is None else stated.layer
    around = [each for each in (layer - 1, layer, layer + 1) if 0 <= each < num_hidden_layers]
    hooks = [TapInput(hook=hook, layer=each) for hook in ("resid_pre", "resid_post", "attn_out", "mlp_out") for each in around]
    near = {taps[0] for taps, tokens in neighbouring_places(inputs, num_hidden_layers) if not tokens}
    return [((tap,), 0) for tap in (*hooks, TapInput(hook="final_norm", layer=None)) if tap != stated and tap not in near]


def _other_orders(inputs: tuple[TapInput, ...]) -> list[Place]:
    """Returns the taps (places in the model) that a probe reads in other orders: all orders of up to three taps, the reverse
    order of more.
    """
    orders = permutations(inputs) if len(inputs) <= _ALL_ORDERS else [tuple(reversed(inputs))]
    return [(order, 0) for order in orders if order != inputs]


def _on(scorer: GoldenScorer, change: Any) -> GoldenScorer:  # noqa: ANN401  a function of arrays
    """Returns a scorer that runs the same probe on changed activations, such as those of another tap (place in the model)."""
    probe = scorer.probe

    def score(inputs: GraphInputs) -> NDArray[Any]:
        return probe.score(
            {name: rows if name in (CU_SEQLENS, POSITIONS) else np.ascontiguousarray(change(rows)) for name, rows in inputs.items()}
        )

    return replace(scorer, probe=replace(probe, score=score))


def _toggled(prompt: NDArray[np.int64], bos: int) -> NDArray[np.int64]:
    return prompt[1:] if len(prompt) and prompt[0] == bos else np.concatenate([[bos], prompt])


def _named(place: Place) -> str:
    taps, tokens = place
    shift = f", one token {'later' if tokens > 0 else 'earlier'}" if tokens else ""
    return f"{', '.join(str(tap.tap) for tap in taps)}{shift}"


def _remedy(place: Place) -> str:
    taps, tokens = place
    if tokens:
        return "its author reads another position than that of the token itself; no tap does: fit it again, or shift the author's scores"
    return "give " + " ".join(f"--tap {tap.tap}" for tap in taps)


def _sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):
        probabilities: Array = 1 / (1 + np.exp(-x))
    return probabilities


def _scale(found: Array, expected: Array) -> float | None:
    """Returns the factor by which a probe's scores must be multiplied to become its author's, if this factor alone, the same for all
    labels, explains most of their difference; ``None`` otherwise.
    """
    if len(found) < _FEWEST_FOR_SCALE:
        return None
    mine, difference = found - found.mean(axis=0), expected - found
    difference = difference - difference.mean(axis=0)
    excess = float((mine * difference).sum() / max((mine**2).sum(), 1e-300))
    rest = difference - excess * mine
    explained = float((difference**2).sum()) > _EXPLAINED * float((rest**2).sum())
    return 1 + excess if explained and abs(excess) > EXACT else None


def _correlation(found: Array, expected: Array) -> float:
    columns = []
    for mine, theirs in zip(found.T, expected.T, strict=True):
        columns.append(float(np.corrcoef(mine, theirs)[0, 1]) if mine.std() > 0 else 0.0)
    return min(columns, key=abs)
