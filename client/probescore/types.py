"""Defines the values of the client: what is scored, and what comes back.

Everything here is frozen, holds numpy arrays rather than lists, and is shared by the client, the in-process ``Engine`` and the server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Union

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probescore.reductions import Reduction


class Scope(str, Enum):
    """Says which tokens of a rollout are scored: those of the completion, of the prompt, or all."""

    COMPLETION = "completion"
    PROMPT = "prompt"
    ALL = "all"


class CompletionStatus(str, Enum):
    """Says whether a completion could be scored: ``NON_FINITE`` means that a probe gave no finite number."""

    OK = "ok"
    NON_FINITE = "non_finite"


class ScoreUnit(str, Enum):
    """Says what a probe's numbers are: logits, probabilities, or other values."""

    LOGIT = "logit"
    PROBABILITY = "probability"
    VALUE = "value"


class OutputPer(str, Enum):
    """Says what a probe scores: each token, or the rollout as a whole."""

    TOKEN = "token"
    ROLLOUT = "rollout"


class Hook(str, Enum):
    """Where in a model a probe can read."""

    RESID_PRE = "resid_pre"
    RESID_POST = "resid_post"
    ATTN_OUT = "attn_out"
    MLP_OUT = "mlp_out"
    FINAL_NORM = "final_norm"

    def __str__(self) -> str:
        return self.value

    @property
    def has_layer(self) -> bool:
        """Whether each decoder block has one; else the model has one."""
        return self is not Hook.FINAL_NORM


# ---------------------------------------------------------------------------------------------------------------- what is scored


@dataclass(frozen=True)
class Text:
    """Holds a prompt as text for the server to tokenise; the answer is flagged ``inexact_ids``.

    Attributes:
        text: the prompt's text.
        add_special_tokens: whether the tokenizer adds its special tokens, such as BOS; refused where that would double a BOS that the text
            starts with.
    """

    text: str
    add_special_tokens: bool = False


@dataclass(frozen=True)
class ChatMessage:
    """Holds one message of a conversation; ``role`` is what the model's chat template calls its author."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """Holds a conversation up to, and without, the completion; the server renders it with the model's chat template."""

    messages: tuple[ChatMessage, ...]

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, str]]) -> Chat:
        """Makes a conversation of the usual list of ``{"role": …, "content": …}``."""
        return cls(tuple(ChatMessage(message["role"], message["content"]) for message in messages))


@dataclass(frozen=True)
class Span:
    """Names a half-open range ``[start, end)`` of tokens, relative to its completion, which is scored apart."""

    name: str
    start: int
    end: int


TokenIds = Union[NDArray[np.integer[Any]], Sequence[int]]
"""Are token ids, ``(T,)`` integers, taken verbatim."""


@dataclass(frozen=True, eq=False)
class Completion:
    """Holds tokens whose scores are wanted, given a prompt.

    Attributes:
        tokens: ids ``(T,)``, taken verbatim, EOS included; or a ``str`` that the server tokenises without special tokens.
        mask: ``(T,)`` of 0 and 1, which tokens count in reductions; ``None`` = all.
        spans: parts to score apart, under the mask; their names differ.
        follow_ups: continuations, each read as a fork of this completion; they may nest.
        id: a name of the caller's choice, which comes back with the scores.
    """

    tokens: TokenIds | str
    mask: ArrayLike | None = None
    spans: tuple[Span, ...] = ()
    follow_ups: tuple[Completion, ...] = ()
    id: str = ""


@dataclass(frozen=True, eq=False)
class RolloutGroup:
    """Holds one prompt and its completions; the server computes the prompt once for all of them.

    Attributes:
        prompt: ids ``(P,)``, taken verbatim (no BOS is added), a ``str``, a ``Text`` or a ``Chat``.
        completions: each a ``Completion``, or just its tokens.
    """

    prompt: TokenIds | str | Text | Chat
    completions: Sequence[Completion | TokenIds | str]


# --------------------------------------------------------------------------------------------------------------- what comes back


@dataclass(frozen=True)
class ScoredProbe:
    """Describes a probe as it was applied to the rollouts of an answer.

    Attributes:
        name: the probe's name.
        version: its version; a name and a version always mean the same bytes.
        graph_sha256: digest of its graph, which computes the scores.
        manifest_sha256: digest of the rest of its manifest, calibrations included.
        unit: what its numbers are.
        output_per: whether it scores tokens or rollouts.
        labels: names of the values per token or rollout, in order; a single value has one label.
        reductions: in the order of ``ProbeScores.reduced``; empty for a probe that pools by itself.
        follow_up_tokens: of the follow-up that the probe itself appends to every completion and reads instead; 0 = it reads the completion.
        accepted_mismatches: checks that failed and that the server's operator chose to accept, such as ``"tokenizer_fingerprint"``.
        reading: whose activations it read; ``"frozen"`` are those of the server's own model.
        exclude_special_tokens: the tokenizer's special tokens do not count, so that a selection of nothing else is absent.
    """

    name: str
    version: str
    graph_sha256: str
    manifest_sha256: str
    unit: ScoreUnit
    output_per: OutputPer
    labels: tuple[str, ...]
    reductions: tuple[Reduction, ...]
    accepted_mismatches: tuple[str, ...] = ()
    reading: str = "frozen"
    follow_up_tokens: int = 0
    exclude_special_tokens: bool = False

    @property
    def key(self) -> str:
        """Returns ``name@version``, which is one probe's only."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, eq=False)
class ProbeScores:
    """Holds what one probe says of one completion.

    Attributes:
        reduced: ``(1 + spans, reductions, labels)`` float32 in the probe's unit. Row 0 is the whole scope under the mask, then the spans
            in the request's order. NaN = absent. A probe that pools by itself has a middle axis of length 1.
        tokens: ``(tokens in scope, labels)`` float32, entry *i* read at the position whose input is token *i*; ``None`` unless asked for.
    """

    reduced: NDArray[np.float32]
    tokens: NDArray[np.float32] | None = None

    @property
    def value(self) -> float | None:
        """Returns the number of the whole scope, first reduction, first label; ``None`` if nothing was selected."""
        return self.at()

    def at(self, span: int = 0, reduction: int = 0, label: int = 0) -> float | None:
        """Returns one reduced number by its three indices, or ``None`` if that selection was empty."""
        number = float(self.reduced[span, reduction, label])
        return None if np.isnan(number) else number


@dataclass(frozen=True, eq=False)
class CompletionScores:
    """Holds the scores of one completion.

    Attributes:
        id: the completion's, as it was sent.
        status: whether it could be scored.
        scores: by probe, under its name, or ``name@version`` where several versions of one name were applied; empty when ``status`` is
            not ``OK``.
        status_message: why it could not be scored; empty otherwise.
        prompt_ids: ``(P,)`` int32, only if asked for (never on a follow-up).
        completion_ids: ``(T,)`` int32, only if asked for.
        inexact_ids: some ids came from text, so that they may differ from those the policy sampled.
        follow_ups: one per follow-up, in the request's order.
        prompt_texts: ``P`` pieces of text for people, only if asked for (never on a follow-up).
        completion_texts: ``T`` pieces of text for people, only if asked for.
    """

    id: str
    status: CompletionStatus
    scores: Mapping[str, ProbeScores]
    status_message: str = ""
    prompt_ids: NDArray[np.int32] | None = None
    completion_ids: NDArray[np.int32] | None = None
    inexact_ids: bool = False
    follow_ups: tuple[CompletionScores, ...] = ()
    prompt_texts: tuple[str, ...] | None = None
    completion_texts: tuple[str, ...] | None = None

    def __getitem__(self, probe: str) -> ProbeScores:
        if self.status is not CompletionStatus.OK:
            raise KeyError(f"no scores: {self.status_message or self.status.value}")
        if probe not in self.scores:
            raise KeyError(f"no probe {probe!r} in this answer; it has {', '.join(map(repr, self.scores)) or 'none'}")
        return self.scores[probe]


@dataclass(frozen=True)
class Usage:
    """Counts the work done for an answer.

    The three token counts add up to every prompt (once per completion), completion and follow-up.

    Attributes:
        tokens_computed: tokens that ran through the model.
        tokens_shared: tokens computed once for several completions, counted from the second on.
        tokens_cached: tokens taken from the key-value cache of earlier work.
        queue_seconds: from admission until the first of the completions reached the device.
        compute_seconds: of the device batches in which they took part.
    """

    tokens_computed: int = 0
    tokens_shared: int = 0
    tokens_cached: int = 0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Returns how many tokens reading each rollout by itself would compute: computed, shared and cached."""
        return self.tokens_computed + self.tokens_shared + self.tokens_cached

    @classmethod
    def total(cls, usages: Iterable[Usage]) -> Usage:
        """Returns the sum of several usages, number by number."""
        usages = list(usages)
        return cls(**{each.name: sum(getattr(usage, each.name) for usage in usages) for each in fields(cls)})


@dataclass(frozen=True)
class ScoringInfo:
    """Says what produced the scores of an answer, and what it took.

    Attributes:
        model_fingerprint: of the model that was run, ``"sha256:…"``.
        tokenizer_fingerprint: of the server's tokenizer, ``"sha256:…"``; empty if it has none.
        probes: as they were applied.
        usage: the work done.
    """

    model_fingerprint: str
    tokenizer_fingerprint: str
    probes: tuple[ScoredProbe, ...]
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, eq=False)
class GroupScores:
    """Holds the scores of one group, in the order of its completions."""

    completions: tuple[CompletionScores, ...]

    def __getitem__(self, index: int) -> CompletionScores:
        return self.completions[index]

    def __iter__(self) -> Iterator[CompletionScores]:
        return iter(self.completions)

    def __len__(self) -> int:
        return len(self.completions)


@dataclass(frozen=True, eq=False)
class ScoreResult:
    """Holds the answer to ``score``: the scores of each group, in the request's order, and what produced them."""

    groups: tuple[GroupScores, ...]
    info: ScoringInfo

    def values(self, probe: str, *, reduction: int = 0, label: int = 0) -> NDArray[np.float32]:
        """Returns one number per completion, group after group, ``(completions,)`` float32 in the probe's unit.

        NaN where the selection was empty or the completion could not be scored (see ``CompletionScores.status``): it never reads as 0.
        """
        numbers = (
            scored[probe].at(0, reduction, label) if scored.status is CompletionStatus.OK else None
            for group in self.groups
            for scored in group
        )
        return np.array([np.nan if number is None else number for number in numbers], np.float32)


@dataclass(frozen=True, eq=False)
class StreamedCompletion:
    """Holds one answer of ``score_stream``: the scores of completion ``completion_index`` of the group that came ``group_index``-th.

    ``info.usage`` is that of all completions that finished in the same message.
    """

    group_index: int
    completion_index: int
    scores: CompletionScores
    info: ScoringInfo


def score_keys(probes: Sequence[ScoredProbe]) -> tuple[str, ...]:
    """Returns the keys of ``CompletionScores.scores``, in the order of ``probes``.

    A probe's key is its name, or ``name@version`` where several versions of one name were applied.
    """
    names = Counter(probe.name for probe in probes)
    return tuple(probe.name if names[probe.name] == 1 else probe.key for probe in probes)


# ---------------------------------------------------------------------------------------------------------------- what runs there


@dataclass(frozen=True)
class Tap:
    """Says where in the model a probe reads: at which hook, and in which decoder block.

    ``hook`` is a ``Hook``, or the name of one that only a newer server knows; ``layer`` is the 0-based index of the decoder block (``None``
    for ``final_norm``).

    ``str(tap)`` is the name of the graph input that reads it: ``"resid_post.6"``, ``"final_norm"``.
    """

    hook: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.hook if self.layer is None else f"{self.hook}.{self.layer}"


@dataclass(frozen=True)
class Calibration:
    """Describes a threshold and the data it was found on; at or above it a rollout counts as flagged.

    Attributes:
        threshold: in the unit of the probe, after ``reduction``.
        false_positive_rate: the rate aimed at, in (0, 1).
        false_positive_rate_low: the lower end of the 95% confidence interval of the rate at this threshold.
        false_positive_rate_high: the upper end of that interval.
        negatives: how many negative rollouts it was found on.
        dataset: which data these are, in words.
        reduction: the reduction that it holds for; ``None`` for a probe that pools by itself.
        label: the label that it holds for, where the probe has several.
    """

    threshold: float
    false_positive_rate: float
    false_positive_rate_low: float
    false_positive_rate_high: float
    negatives: int
    dataset: str
    reduction: Reduction | None = None
    label: str = ""


@dataclass(frozen=True)
class ProbeInfo:
    """Describes a loaded probe.

    Attributes:
        name: the probe's name.
        version: its version; a name and a version always mean the same bytes.
        description: what it looks for, in its author's words.
        graph_sha256: digest of its graph, which computes the scores.
        manifest_sha256: digest of the rest of its manifest, calibrations included.
        taps: where in the model it reads.
        unit: what its numbers are.
        output_per: whether it scores tokens or rollouts.
        labels: names of the values per token or rollout, in order; a single value has one label.
        default_reduction: how its scores become one number unless a request says otherwise; ``None`` if it pools by itself.
        calibrations: its thresholds.
        accepted_mismatches: checks that failed and that the server's operator chose to accept, such as ``"tokenizer_fingerprint"``.
        manifest_json: its whole manifest as JSON, without the golden vectors.
    """

    name: str
    version: str
    description: str
    graph_sha256: str
    manifest_sha256: str
    taps: tuple[Tap, ...]
    unit: ScoreUnit
    output_per: OutputPer
    labels: tuple[str, ...]
    default_reduction: Reduction | None
    calibrations: tuple[Calibration, ...]
    accepted_mismatches: tuple[str, ...]
    manifest_json: str

    @property
    def key(self) -> str:
        """Returns ``name@version``, which is one probe's only."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class ModelInfo:
    """Describes the frozen model of a server.

    Attributes:
        id: its name as the server was given it; of a path the last component only.
        revision: its revision; empty for a local model.
        fingerprint: of its weights and configuration, ``"sha256:…"``.
        model_type: its architecture, as ``transformers`` calls it.
        hidden_size: the width of the residual stream.
        num_hidden_layers: decoder blocks of the whole model.
        num_loaded_layers: the decoder blocks that are loaded, because some probe needs them.
        vocab_size: the number of token ids; ids are in ``[0, vocab_size)``.
        max_position_embeddings: the most positions that the model was made for; 0 if unknown.
    """

    id: str
    revision: str
    fingerprint: str
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_loaded_layers: int
    vocab_size: int
    max_position_embeddings: int


@dataclass(frozen=True)
class Limits:
    """Holds what a request may hold at most; above any of these it is refused, never cut short. The proto says what each counts.

    0 = the server does not say: it is of an earlier version.
    """

    max_message_bytes: int
    max_request_tokens: int
    max_rollout_tokens: int
    max_queue_tokens: int
    max_batch_tokens: int
    max_request_rollouts: int = 0
    max_follow_ups: int = 0
    max_reductions: int = 0
    max_spans: int = 0
    max_span_scores: int = 0
    max_request_values: int = 0
    max_text_bytes_per_token: int = 0
    max_chat_messages: int = 0
    max_chat_seconds: float = 0.0
    max_calls: int = 0
    max_in_flight_bytes: int = 0
    max_connections: int = 0
    max_calls_per_connection: int = 0


@dataclass(frozen=True)
class WorkerInfo:
    """Describes one worker process of a server.

    Attributes:
        device: ``cpu`` or ``cuda:0``.
        dtype: of the model's numbers: ``float32``, ``bfloat16`` or ``float16``.
        execution_path: how it runs the model: ``universal`` or ``packed``.
        ready: whether it can score.
        restarts: how often it has been restarted since the server started.
        asleep: whether it has given its device's memory back; until it is woken it cannot score, and work waits for it.
    """

    device: str
    dtype: str
    execution_path: str
    ready: bool
    restarts: int
    asleep: bool = False


@dataclass(frozen=True)
class Transfer:
    """Says what ``sleep`` or ``wake`` moved on one device. All numbers are 0 if it was in that state already.

    Attributes:
        device: ``cpu`` or ``cuda:0``.
        seconds: how long it took, without the batch that computed before.
        weight_bytes: of weights, copied between the device and host memory; 0 on a CPU, where they stay.
        device_bytes: of the device's memory, given back or taken: what torch holds there less or more than before. On a CPU those of
            the key-value cache.
    """

    device: str
    seconds: float = 0.0
    weight_bytes: int = 0
    device_bytes: int = 0


@dataclass(frozen=True)
class ServerInfo:
    """Describes what runs at an address.

    Attributes:
        server_version: the version of the server's software.
        model: the frozen model.
        tokenizer_fingerprint: of its tokenizer, ``"sha256:…"``; empty if it has none.
        limits: what a request may hold.
        workers: one for each device.
        probes: ``name@version`` of each loaded probe.
    """

    server_version: str
    model: ModelInfo
    tokenizer_fingerprint: str
    limits: Limits
    workers: tuple[WorkerInfo, ...]
    probes: tuple[str, ...]
