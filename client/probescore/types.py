"""Defines the value objects of the client: rollouts to score, and scores, server and probe descriptions that come back.

All classes here are frozen, contain numpy arrays rather than lists, and are shared by the client, the in-process ``Engine`` and the server.
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
    """Enumeration of the parts of a rollout whose tokens can be scored: the completion, the prompt, or both."""

    COMPLETION = "completion"
    PROMPT = "prompt"
    ALL = "all"


class CompletionStatus(str, Enum):
    """Enumeration of the results of scoring a completion; ``NON_FINITE`` means that a probe computed a number that is not finite."""

    OK = "ok"
    NON_FINITE = "non_finite"


class ScoreUnit(str, Enum):
    """Enumeration of the units of a probe's scores: logits, probabilities, or other values."""

    LOGIT = "logit"
    PROBABILITY = "probability"
    VALUE = "value"


class OutputPer(str, Enum):
    """Enumeration of the units of text that a probe scores: each token, or the rollout as a whole."""

    TOKEN = "token"
    ROLLOUT = "rollout"


class Hook(str, Enum):
    """Enumeration of the kinds of places in a language model at which a probe can read activations."""

    RESID_PRE = "resid_pre"
    RESID_POST = "resid_post"
    ATTN_OUT = "attn_out"
    MLP_OUT = "mlp_out"
    FINAL_NORM = "final_norm"

    def __str__(self) -> str:
        return self.value

    @property
    def has_layer(self) -> bool:
        """Whether each decoder block has a place of this kind; otherwise the whole model has a single one."""
        return self is not Hook.FINAL_NORM


# ---------------------------------------------------------------------------------------------------------------- what is scored


@dataclass(frozen=True)
class Text:
    """A prompt as text, which the server tokenises; the scores are then flagged ``inexact_ids``.

    Attributes:
        text: the prompt's text.
        add_special_tokens: whether the tokenizer adds its special tokens, such as BOS. The server refuses a text that starts with BOS
            already if the tokenizer would add a second BOS.
    """

    text: str
    add_special_tokens: bool = False


@dataclass(frozen=True)
class ChatMessage:
    """One message of a conversation; ``role`` is the author's role by the name that the model's chat template uses, such as ``"user"``."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """A conversation that serves as a prompt, without the completion; the server renders the conversation with the model's chat
    template.
    """

    messages: tuple[ChatMessage, ...]

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, str]]) -> Chat:
        """Makes a conversation from a list of dictionaries ``{"role": …, "content": …}``."""
        return cls(tuple(ChatMessage(message["role"], message["content"]) for message in messages))


@dataclass(frozen=True)
class Span:
    """A named half-open range ``[start, end)`` of a completion's tokens, which is scored separately; indices count from the completion's
    first token.
    """

    name: str
    start: int
    end: int


TokenIds = Union[NDArray[np.integer[Any]], Sequence[int]]
"""Token ids as an array ``(T,)`` of integers, which are used unchanged."""


@dataclass(frozen=True, eq=False)
class Completion:
    """A completion to score: the tokens that follow a prompt.

    Attributes:
        tokens: token ids ``(T,)``, used unchanged, EOS included; or a ``str`` that the server tokenises without adding special tokens.
        mask: ``(T,)`` of 0 and 1, 1 = the token counts in reductions; ``None`` = all tokens count.
        spans: named parts of the completion that are scored separately, under the mask. Names must be unique.
        follow_ups: token ids appended to the finished completion, such as a question about it. The model reads each follow-up as a fork of
            this completion, without recomputing the completion. A follow-up may have follow-ups of its own.
        id: a name chosen by the caller, which comes back with the scores.
    """

    tokens: TokenIds | str
    mask: ArrayLike | None = None
    spans: tuple[Span, ...] = ()
    follow_ups: tuple[Completion, ...] = ()
    id: str = ""


@dataclass(frozen=True, eq=False)
class RolloutGroup:
    """A prompt and its completions; the server computes the prompt once for all its completions.

    Attributes:
        prompt: token ids ``(P,)``, used unchanged (no BOS is added), a ``str``, a ``Text`` or a ``Chat``.
        completions: the completions, each as a ``Completion`` or as its tokens only.
    """

    prompt: TokenIds | str | Text | Chat
    completions: Sequence[Completion | TokenIds | str]


# --------------------------------------------------------------------------------------------------------------- what comes back


@dataclass(frozen=True)
class ScoredProbe:
    """Description of a probe that has scored the rollouts of a response.

    Attributes:
        name: the probe's name.
        version: the probe's version; a name and a version always identify the same bytes.
        graph_sha256: digest of the probe's ONNX graph, which computes the scores.
        manifest_sha256: digest of the probe's manifest without the graph's digest, calibrations included.
        unit: unit of the probe's scores.
        output_per: whether the probe scores tokens or rollouts.
        labels: names of the values per token or rollout, in order; a single value has one label.
        reductions: reductions from per-token scores to one number, in the order of ``ProbeScores.reduced``; empty for a probe that scores
            rollouts.
        follow_up_tokens: number of tokens that the probe itself appends to every completion (a follow-up) and scores instead of the
            completion; 0 = the probe scores the completion.
        accepted_mismatches: failed checks of the probe that the server's operator chose to accept, such as ``"tokenizer_fingerprint"``.
        reading: name of the model whose activations the probe has read; ``"frozen"`` = the server's own model.
        exclude_special_tokens: whether the tokenizer's special tokens do not count; the score of a selection that has only special tokens
            is then absent.
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
        """Returns ``name@version``, which identifies one probe."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, eq=False)
class ProbeScores:
    """Scores that one probe has given to one completion.

    Attributes:
        reduced: ``(1 + spans, reductions, labels)`` float32 in the probe's unit. Row 0 is the whole scope (the scored part of the rollout)
            under the mask; the following rows are the spans in the request's order. NaN = the selection was empty. For a probe that scores
            rollouts the middle axis has length 1.
        tokens: ``(tokens in scope, labels)`` float32; row *i* is the score at the position whose input is token *i*. ``None`` unless token
            scores were requested.
    """

    reduced: NDArray[np.float32]
    tokens: NDArray[np.float32] | None = None

    @property
    def value(self) -> float | None:
        """Score of the whole scope (the scored part of the rollout), for the first reduction and the first label; ``None`` if no token was
        selected.
        """
        return self.at()

    def at(self, span: int = 0, reduction: int = 0, label: int = 0) -> float | None:
        """Returns the reduced score of a span (or of the scope), a reduction and a label, given by their indices; ``None`` if the selection
        was empty.
        """
        number = float(self.reduced[span, reduction, label])
        return None if np.isnan(number) else number


@dataclass(frozen=True, eq=False)
class CompletionScores:
    """Scores of one completion by all probes.

    Attributes:
        id: the completion's id, as it was sent.
        status: whether the completion could be scored.
        scores: a dictionary of scores keyed by the probe's name, or by ``name@version`` if several versions of one probe were applied;
            empty when ``status`` is not ``OK``.
        status_message: reason why the completion could not be scored; empty otherwise.
        prompt_ids: ``(P,)`` int32, only if requested (never on a follow-up).
        completion_ids: ``(T,)`` int32, only if requested.
        inexact_ids: whether some token ids were made from text by the server; such ids may differ from the ids that the policy sampled.
        follow_ups: scores of each follow-up (token ids appended to the completion), in the request's order.
        prompt_texts: the prompt's ``P`` tokens as text, for people, only if requested (never on a follow-up).
        completion_texts: the completion's ``T`` tokens as text, for people, only if requested.
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
    """Counts of the work that the server did for a response.

    The three token counts add up to the tokens of every prompt (once per completion), completion and follow-up.

    Attributes:
        tokens_computed: tokens that ran through the model.
        tokens_shared: tokens computed once for several completions, counted from the second on.
        tokens_cached: tokens taken from the key-value cache of earlier work.
        queue_seconds: seconds from the admission of the request until computation of its first completion began on the device (such as
            ``cuda:0``).
        compute_seconds: seconds of computation of the device batches that contained completions of the request.
    """

    tokens_computed: int = 0
    tokens_shared: int = 0
    tokens_cached: int = 0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Number of tokens that would be computed if each rollout were read separately: computed, shared and cached tokens."""
        return self.tokens_computed + self.tokens_shared + self.tokens_cached

    @classmethod
    def total(cls, usages: Iterable[Usage]) -> Usage:
        """Returns the sum of several usages, number by number."""
        usages = list(usages)
        return cls(**{each.name: sum(getattr(usage, each.name) for usage in usages) for each in fields(cls)})


@dataclass(frozen=True)
class ScoringInfo:
    """Description of the model, tokenizer and probes that produced the scores of a response, and of the work done.

    Attributes:
        model_fingerprint: fingerprint of the model that was run, ``"sha256:…"``.
        tokenizer_fingerprint: fingerprint of the server's tokenizer, ``"sha256:…"``; empty if the server has no tokenizer.
        probes: the probes that were applied.
        usage: the work done.
    """

    model_fingerprint: str
    tokenizer_fingerprint: str
    probes: tuple[ScoredProbe, ...]
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, eq=False)
class GroupScores:
    """Scores of one rollout group, in the order of the group's completions."""

    completions: tuple[CompletionScores, ...]

    def __getitem__(self, index: int) -> CompletionScores:
        return self.completions[index]

    def __iter__(self) -> Iterator[CompletionScores]:
        return iter(self.completions)

    def __len__(self) -> int:
        return len(self.completions)


@dataclass(frozen=True, eq=False)
class ScoreResult:
    """Result of ``score``: the scores of each rollout group in the request's order, and a description of the model and probes that produced
    the scores.
    """

    groups: tuple[GroupScores, ...]
    info: ScoringInfo

    def values(self, probe: str, *, reduction: int = 0, label: int = 0) -> NDArray[np.float32]:
        """Returns one probe's score of each completion, group after group, as ``(completions,)`` float32 in the probe's unit.

        The number is NaN, never 0, where the selection was empty or the completion could not be scored (see ``CompletionScores.status``).
        """
        numbers = (
            scored[probe].at(0, reduction, label) if scored.status is CompletionStatus.OK else None
            for group in self.groups
            for scored in group
        )
        return np.array([np.nan if number is None else number for number in numbers], np.float32)


@dataclass(frozen=True, eq=False)
class StreamedCompletion:
    """One result of ``score_stream``: the scores of completion ``completion_index`` of rollout group ``group_index``. Both indices start at
    0 and follow the order in which groups and completions were given.

    ``info.usage`` counts the work for all completions that came in the same response message.
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
    """Place in the model at which a probe reads activations: a hook (the kind of place) and a decoder block.

    ``hook`` is a ``Hook``, or the name of a hook that only a newer server knows; ``layer`` is the 0-based index of the decoder block
    (``None`` for ``final_norm``).

    ``str(tap)`` is the name of the probe graph's input for these activations: ``"resid_post.6"``, ``"final_norm"``.
    """

    hook: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.hook if self.layer is None else f"{self.hook}.{self.layer}"


@dataclass(frozen=True)
class Calibration:
    """A threshold of a probe and the data on which the threshold was found; a rollout whose score is at or above the threshold counts as
    flagged.

    Attributes:
        threshold: threshold for reduced scores, in the unit of the probe.
        false_positive_rate: false-positive rate that the threshold aims at, in (0, 1).
        false_positive_rate_low: the lower end of the 95% confidence interval of the rate at this threshold.
        false_positive_rate_high: the upper end of that interval.
        negatives: number of negative rollouts on which the threshold was found.
        dataset: description of the data, in words.
        reduction: the reduction for whose scores the threshold holds; ``None`` for a probe that scores rollouts.
        label: the label for whose scores the threshold holds, if the probe has several labels.
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
    """Description of a probe that a server has loaded.

    Attributes:
        name: the probe's name.
        version: the probe's version; a name and a version always identify the same bytes.
        description: what the probe detects, in its author's words.
        graph_sha256: digest of the probe's ONNX graph, which computes the scores.
        manifest_sha256: digest of the probe's manifest without the graph's digest, calibrations included.
        taps: places in the model at which the probe reads activations.
        unit: unit of the probe's scores.
        output_per: whether the probe scores tokens or rollouts.
        labels: names of the values per token or rollout, in order; a single value has one label.
        default_reduction: reduction of the per-token scores to one number, used unless a request asks for another one; ``None`` for a probe
            that scores rollouts.
        calibrations: the probe's calibrated thresholds.
        accepted_mismatches: failed checks of the probe that the server's operator chose to accept, such as ``"tokenizer_fingerprint"``.
        manifest_json: the probe's manifest as JSON, without the golden vectors (token ids with expected scores).
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
        """Returns ``name@version``, which identifies one probe."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class ModelInfo:
    """Description of the frozen language model of a server.

    Attributes:
        id: the model's name as configured in the server; of a path the last component only.
        revision: the model's revision; empty for a local model.
        fingerprint: digest of the model's weights and configuration, ``"sha256:…"``.
        model_type: the model's architecture, by its name in ``transformers``.
        hidden_size: the width of the residual stream.
        num_hidden_layers: number of decoder blocks of the whole model.
        num_loaded_layers: number of decoder blocks that are loaded, because some probe needs their activations.
        vocab_size: the number of token ids; ids are in ``[0, vocab_size)``.
        max_position_embeddings: maximum number of positions that the model was made for; 0 if unknown.
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
    """Maximum sizes of requests to a server; a request above a limit is refused, never cut short. The comments in the ``.proto`` file
    define what each limit counts.

    A limit of 0 means that the server, being of an earlier version, does not state the limit.
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
    """Description of one worker process of a server.

    Attributes:
        device: the worker's device, such as ``cpu`` or ``cuda:0``.
        dtype: data type of the model's weights and activations: ``float32``, ``bfloat16`` or ``float16``.
        execution_path: implementation with which the worker runs the model: ``universal`` or ``packed``.
        ready: whether the worker can score.
        restarts: number of times that the worker has been restarted since the server started.
        asleep: whether the worker has freed its device's memory; until the worker is woken it cannot score, and requests wait.
    """

    device: str
    dtype: str
    execution_path: str
    ready: bool
    restarts: int
    asleep: bool = False


@dataclass(frozen=True)
class Transfer:
    """Record of the memory that ``sleep`` or ``wake`` moved on one device. All numbers are 0 if the device was in the requested state
    already.

    Attributes:
        device: the device, such as ``cpu`` or ``cuda:0``.
        seconds: duration of the move, without the time of waiting for the batch that was being computed.
        weight_bytes: bytes of weights copied between the device and host memory; 0 on a CPU, where weights stay in place.
        device_bytes: bytes of the device's memory that were freed or allocated: the change in the memory that torch holds on the device. On
            a CPU, the bytes of the key-value cache.
    """

    device: str
    seconds: float = 0.0
    weight_bytes: int = 0
    device_bytes: int = 0


@dataclass(frozen=True)
class ServerInfo:
    """Description of a server: its software, model, limits, workers and probes.

    Attributes:
        server_version: the version of the server's software.
        model: the frozen model.
        tokenizer_fingerprint: fingerprint of the server's tokenizer, ``"sha256:…"``; empty if the server has no tokenizer.
        limits: maximum sizes of requests.
        workers: the worker processes, one for each device.
        probes: ``name@version`` of each loaded probe.
    """

    server_version: str
    model: ModelInfo
    tokenizer_fingerprint: str
    limits: Limits
    workers: tuple[WorkerInfo, ...]
    probes: tuple[str, ...]
