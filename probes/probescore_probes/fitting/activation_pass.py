"""Reads everything that fitting needs from the model in one pass over the data.

It reads pooled activations at all taps (places in the model), and the log-probability that the model itself gives to each completion.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from probescore.types import Completion, CompletionActivations, CompletionStatus, RolloutGroup, Scope, Span
from probescore_probes.fitting.labelled_rollouts import PASSAGE, Example
from probescore_probes.reference import ReferenceModel
from probescore_server.engine.engine import Engine
from probescore_server.errors import InvalidRequest

FINAL_NORM = "final_norm"
_HEAD_ROWS = 256
"""Number of token positions that are multiplied with the unembedding matrix at a time."""
_AGREES = 1e-2
"""Limits the difference from log-probabilities by transformers, in nats; a larger one shows that the model does more than apply its head.
"""

_GROUP = re.compile(r"groups\[(\d+)\]\.(?:completions\[0\]\.?)?(.*)")

Progress = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class ActivationTable:
    """A table of the activations and log-probabilities that were read for each example.

    Attributes:
        taps: names of the taps, in the order of the model's blocks.
        pools: names of the poolings: ``mean`` and ``last``.
        pooled: activations ``(n, hidden_size)`` float32 over the tokens that the label is about, a dictionary keyed by tap (place in the
            model) and pooling.
        surprise: −log P of those tokens under the model, in nats, summed, ``(n,)``; NaN where it is not known.
        predicted: number of tokens that ``surprise`` is summed over, ``(n,)``.
        sink: norm at position 0 divided by the median norm of the rollout, ``(n,)``, a dictionary keyed by tap; NaN if position 0 is not
            read.
        surprise_problem: why there is no ``surprise``; empty if there is.
        tokens: for each example the activations of the single tokens that the label is about, ``(tokens, hidden_size)`` float32, a
            dictionary keyed by tap; empty = not read.
        features: features of a sparse autoencoder, ``(n, features)`` float32, a dictionary keyed by the reduction over tokens; empty = no
            autoencoder.
    """

    taps: tuple[str, ...]
    pools: tuple[str, ...]
    pooled: dict[tuple[str, str], NDArray[np.float32]]
    surprise: NDArray[np.float64]
    predicted: NDArray[np.int64]
    sink: dict[str, NDArray[np.float64]]
    surprise_problem: str = ""
    tokens: dict[str, tuple[NDArray[np.float32], ...]] = field(default_factory=dict)
    features: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def of(self, indices: NDArray[np.int64]) -> ActivationTable:
        """Returns the part of a table of activations that holds the examples with the given indices."""
        return replace(
            self,
            pooled={key: rows[indices] for key, rows in self.pooled.items()},
            surprise=self.surprise[indices],
            predicted=self.predicted[indices],
            sink={tap: values[indices] for tap, values in self.sink.items()},
            tokens={tap: tuple(rows[index] for index in indices) for tap, rows in self.tokens.items()},
            features={reduction: rows[indices] for reduction, rows in self.features.items()},
        )


def read_activations(
    engine: Engine,
    reference: ReferenceModel,
    examples: Sequence[Example],
    taps: Sequence[str],
    pools: Sequence[str],
    progress: Progress = lambda _done: None,
) -> ActivationTable:
    """Computes a table of activations at all taps, running the model once on every example.

    Args:
        engine: engine that is loaded with these taps and ``final_norm``.
        reference: the same model, whose language-model head is used for log-probabilities.
        examples: examples to read.
        taps: names of the taps.
        pools: names of the poolings: ``mean``, ``last``.
        progress: called after each example with the number of examples that are done.

    Raises:
        ValueError: the engine refuses an example, or the model gives NaN or an infinity; the message names the line of the example.
    """
    width = reference.reference.hidden_size
    count = len(examples)
    pooled = {(tap, pool): np.empty((count, width), np.float32) for tap in taps for pool in pools}
    sink = {tap: np.full(count, np.nan) for tap in taps}
    head = _Head(reference, count)
    read = _read(engine, examples, list(dict.fromkeys([*taps, FINAL_NORM])), [*pools, "tokens"], Scope.ALL)
    for index, (example, found) in enumerate(zip(examples, read, strict=True)):
        if found.status is not CompletionStatus.OK:
            raise ValueError(f"{example.where}: {found.status_message}; leave this rollout out")
        for tap in taps:
            for column, pool in enumerate(pools):
                pooled[tap, pool][index] = found.pooled[tap][1, column]
            if not len(example.prompt_ids) and example.selected[0] and len(example.completion_ids) > 1:
                norms = np.linalg.norm(found.tokens[tap].astype(np.float64), axis=1)
                sink[tap][index] = norms[0] / max(float(np.median(norms[1:])), 1e-30)
        head.add(index, example, found.tokens[FINAL_NORM])
        progress(index + 1)
    surprise, predicted = head.finished()
    return ActivationTable(tuple(taps), tuple(pools), pooled, surprise, predicted, sink, head.problem)


def read_as_served(engine: Engine, examples: Sequence[Example], table: ActivationTable, taps: Sequence[str]) -> ActivationTable:
    """Reads the pooled activations of some taps (places in the model) again, in the batches in which an engine scores the same examples.

    In a coarse dtype an activation depends on what else is in its batch, by .01 to .03 standard deviations of scores in a trained model.
    Read in the batches that are scored, it leaves no difference between fitted and served scores but that of the probe's own arithmetic.

    Args:
        engine: engine that is loaded with these taps, in the dtype in which the probe is served.
        examples: all examples, in the order in which they are scored.
        table: their table.
        taps: names of the taps that the probe reads.
    """
    pooled = {(tap, pool): rows.copy() for (tap, pool), rows in table.pooled.items() if tap in taps}
    for index, found in enumerate(engine.activations([example.rollout() for example in examples], taps, pool=table.pools)):
        selection = 0 if examples[index].passage is None else 1
        for tap in taps:
            for column, pool in enumerate(table.pools):
                pooled[tap, pool][index] = found.pooled[tap][selection, column]
    return replace(table, pooled={**table.pooled, **pooled})


def read_tokens(
    engine: Engine, examples: Sequence[Example], taps: Sequence[str], progress: Progress = lambda _done: None
) -> dict[str, tuple[NDArray[np.float32], ...]]:
    """Reads the activations of the tokens that each label is about, ``(tokens, hidden_size)`` an example, a dictionary keyed by tap."""
    found: dict[str, list[NDArray[np.float32]]] = {tap: [] for tap in taps}
    for index, read in enumerate(_read(engine, examples, taps, ["tokens"])):
        for tap in taps:
            found[tap].append(read.tokens[tap][examples[index].selected])
        progress(index + 1)
    return {tap: tuple(rows) for tap, rows in found.items()}


def _read(
    engine: Engine, examples: Sequence[Example], taps: Sequence[str], pool: Sequence[str], scope: Scope = Scope.COMPLETION
) -> Iterator[CompletionActivations]:
    """Yields the activations of each example; what the engine refuses is named by the line of the example, where it counts groups."""
    try:
        yield from engine.activations([_whole(example) for example in examples], taps, pool=pool, scope=scope)
    except InvalidRequest as error:
        place = _GROUP.fullmatch(error.field)
        if place is None:
            raise
        field = f"{place[2]}: " if place[2] else ""
        raise ValueError(f"{examples[int(place[1])].where}: {field}{error.problem}") from None


def _whole(example: Example) -> RolloutGroup:
    """Returns a request with one span over the labelled tokens of an example; pooling over the scope ``all`` would include the prompt."""
    start, end = example.passage or (0, len(example.completion_ids))
    return RolloutGroup(example.prompt_ids, [Completion(example.completion_ids, mask=example.mask, spans=(Span(PASSAGE, start, end),))])


class _Head:
    """Computes the log-probability that the model gave to the labelled tokens, many token positions at a time."""

    def __init__(self, reference: ReferenceModel, count: int) -> None:
        self._reference = reference
        self._surprise = np.zeros(count)
        self._predicted = np.zeros(count, np.int64)
        self._waiting: list[tuple[int, NDArray[np.float32], NDArray[np.int64]]] = []
        self._rows = 0
        self.problem = ""
        embedding = reference.model.get_output_embeddings()
        if embedding is None:
            self.problem = "the model has no language-model head"
        else:
            self._weight: torch.Tensor = embedding.weight.detach()
            self._bias: torch.Tensor | None = getattr(embedding, "bias", None)

    def add(self, index: int, example: Example, hidden: NDArray[np.float32]) -> None:
        """Adds an example, given its activations at ``final_norm``, ``(prompt + completion, hidden_size)``."""
        if self.problem:
            return
        positions = len(example.prompt_ids) + np.flatnonzero(example.selected)
        positions = positions[positions > 0]  # nothing came before the first token
        ids = np.concatenate([example.prompt_ids, example.completion_ids]).astype(np.int64)
        if index == 0:
            self._check(ids, hidden)
        self._waiting.append((index, hidden[positions - 1], ids[positions]))
        self._rows += len(positions)
        if self._rows >= _HEAD_ROWS:
            self._look_up()

    def finished(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Returns, for each example, −log P of its labelled tokens under the model, summed over the tokens, and the number of
        these tokens.
        """
        if not self.problem:
            self._look_up()
        unknown = np.full(len(self._surprise), np.nan)
        return (unknown if self.problem else np.where(self._predicted > 0, self._surprise, np.nan)), self._predicted

    def _look_up(self) -> None:
        if not self._waiting or self.problem:
            self._waiting, self._rows = [], 0
            return
        expected = self._log_probabilities(
            np.concatenate([rows for _, rows, _ in self._waiting]), np.concatenate([targets for _, _, targets in self._waiting])
        )
        start = 0
        for index, _, targets in self._waiting:
            end = start + len(targets)
            self._surprise[index], self._predicted[index] = -expected[start:end].sum(), len(targets)
            start = end
        self._waiting, self._rows = [], 0

    def _log_probabilities(self, hidden: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
        with torch.inference_mode():
            rows = torch.from_numpy(hidden).to(self._weight.device, self._weight.dtype)
            logits = torch.nn.functional.linear(rows, self._weight, self._bias).float()
            config = self._reference.model.config.get_text_config(decoder=True)
            logits = logits * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
            cap = getattr(config, "final_logit_softcapping", None)
            if cap:
                logits = torch.tanh(logits / cap) * cap
            of_targets = logits.log_softmax(dim=-1).gather(1, torch.from_numpy(targets).to(logits.device)[:, None])[:, 0]
        return of_targets.double().cpu().numpy()

    def _check(self, ids: NDArray[np.int64], hidden: NDArray[np.float32]) -> None:
        """Compares logits with those of transformers, since some models transform the final norm's output further before the logits."""
        if len(ids) < 2:
            return
        with torch.inference_mode():
            logits = self._reference.model(input_ids=torch.from_numpy(ids)[None].to(self._weight.device), use_cache=False).logits[0, :-1]
            theirs = logits.float().log_softmax(-1).gather(1, torch.from_numpy(ids[1:]).to(logits.device)[:, None])[:, 0].double().cpu()
        ours = self._log_probabilities(hidden[:-1], ids[1:])
        difference = float(np.abs(ours - theirs.numpy()).mean())
        scale = 1.0 + float(theirs.abs().mean())
        if not difference <= 5 * _AGREES * scale:
            self.problem = f"this model's head is not a plain unembedding: log-probabilities differ by {difference:.2g} nats"
