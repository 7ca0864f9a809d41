"""Checks whether a scoring server's response matches the request that the client sent, so that a faulty server, or one that mixes requests
up, is noticed.

Values that a client cannot verify are not checked: the finite scores themselves, digests, units, the names of labels, texts for people, and
the counts of work done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from probescore._reading_versions import check_readings
from probescore.errors import FieldViolation, MismatchError
from probescore.types import (
    FROZEN,
    CompletionScores,
    CompletionStatus,
    OutputPer,
    ProbeScores,
    ReadingScores,
    Scope,
    ScoredProbe,
    ScoreResult,
    ScoringInfo,
    Usage,
    score_keys,
)
from probescore.v1 import scoring_pb2, tensor_pb2
from probescore.wire import MessageError, options_from_request

HasIds = Union[scoring_pb2.Prompt, scoring_pb2.Completion]

_IDS: dict[int, np.dtype[Any]] = {tensor_pb2.DATA_TYPE_INT32: np.dtype("<i4"), tensor_pb2.DATA_TYPE_INT64: np.dtype("<i8")}
"""Maps the two protobuf tensor types in which the client sends token ids to numpy dtypes."""


class AnswerCheck:
    """Checker that compares all response messages of one scoring RPC with the RPC's request.

    Args:
        request: the request message, as it was sent.

    Every ``check_`` method raises ``MessageError`` for a response that does not match; the error names the field, the requested value and
    the received value. A model or tokenizer fingerprint other than the expected one raises ``MismatchError``, and a server that does not
    know what readings are, and therefore has scored the frozen model, ``ServerError``.
    """

    def __init__(self, request: scoring_pb2.ScoreRequest) -> None:
        self._request = request
        self._options = options_from_request(request)
        self._info: ScoringInfo | None = None
        self._probes: _ProbesByShape | None = None

    def check_result(self, result: ScoreResult) -> None:
        """Checks that a server's whole response to the RPC ``Score`` matches the request."""
        asked = [len(group.completions) for group in self._request.groups]
        came = [len(group) for group in result.groups]
        if len(asked) != len(came):
            raise MessageError("groups", f"has {len(came)}; {len(asked)} were asked for")
        for index, (wanted, given) in enumerate(zip(asked, came, strict=True)):
            if wanted != given:
                raise MessageError(f"groups[{index}].completions", f"has {given}; {wanted} were asked for")
        self.check_info(result.info)
        for index, group in enumerate(result.groups):
            for position, scores in enumerate(group):
                self.check_completion(index, position, scores, f"groups[{index}].completions[{position}]")

    def check_info(self, info: ScoringInfo) -> None:
        """Checks the model, tokenizer, probes and readings that a response message names; all messages of one RPC must name the same ones.
        This method must be called before ``check_completion``.
        """
        # work and unlike rollouts are of the completions in one message
        info = replace(info, usage=Usage(), probes=tuple(_without_completions(probe) for probe in info.probes))
        if self._info is None:
            self._probes = self._checked_probes(info)
            self._info = info
        elif info != self._info:
            raise MessageError("info", "is another than in the call's first message, of one model, the same probes and the same readings")

    def _checked_probes(self, info: ScoringInfo) -> _ProbesByShape:
        for field, expected, found in (
            ("model_fingerprint", self._options.expected_model_fingerprint, info.model_fingerprint),
            ("tokenizer_fingerprint", self._options.expected_tokenizer_fingerprint, info.tokenizer_fingerprint),
        ):
            if expected and found != expected:
                problem = f"the server runs {found}, the request expects {expected}"
                violation = FieldViolation(f"expected_{field}", problem)
                raise MismatchError(f"{violation.field}: {problem}", "FAILED_PRECONDITION", violations=(violation,))
        if not info.model_fingerprint:
            raise MessageError("info.model_fingerprint", "is empty: nobody could say which model scored")
        check_readings(self._options.readings, info.readings, info.model_fingerprint, "info.readings[{}]", done="scored")
        _check_names(self._options.probes, info.probes)
        for index, probe in enumerate(info.probes):
            self._check_probe(probe, f"info.probes[{index}]")
        wanted = self._options.token_scores
        return _ProbesByShape(
            info.probes,
            [
                probe.output_per is OutputPer.TOKEN and (wanted == "all" or probe.name in wanted or probe.key in wanted)
                for probe in info.probes
            ],
            has_tokenizer=bool(info.tokenizer_fingerprint),
        )

    def _check_probe(self, probe: ScoredProbe, field: str) -> None:
        if not probe.graph_sha256 or not probe.manifest_sha256:
            raise MessageError(field, "has no digest: nobody could say which probe scored")
        if probe.reading != "frozen":
            raise MessageError(f"{field}.reading", f"is {probe.reading!r}; 'frozen' was asked for")
        if not probe.labels:
            raise MessageError(f"{field}.labels", "is empty; at least one is needed")
        if probe.output_per is OutputPer.ROLLOUT:
            if probe.reductions:
                raise MessageError(f"{field}.reductions", "is not empty, for a probe that pools by itself")
        elif self._options.reductions and probe.reductions != self._options.reductions:
            came, asked = (", ".join(map(str, written)) or "none" for written in (probe.reductions, self._options.reductions))
            raise MessageError(f"{field}.reductions", f"is {came}; {asked} was asked for")
        elif not self._options.reductions and len(probe.reductions) != 1:
            raise MessageError(f"{field}.reductions", f"has {len(probe.reductions)}; the probe's own default was asked for")

    def check_completion(self, group: int, completion: int, scores: CompletionScores, field: str) -> None:
        """Checks the scores of one completion of the request, and of its follow-ups (token ids appended to the completion); ``field`` is
        the path of the scores in the response, for error messages.
        """
        asked = self._request.groups[group]
        in_text = asked.prompt.WhichOneof("form") in ("text", "chat")
        self._check(asked.completions[completion], scores, field, asked.prompt, inexact=in_text)

    def _check(
        self, asked: scoring_pb2.Completion, scores: CompletionScores, field: str, prompt: scoring_pb2.Prompt | None, *, inexact: bool
    ) -> None:
        """Checks the scores of one completion or follow-up (token ids appended to a completion); ``prompt`` is ``None`` for a follow-up,
        whose scores carry no prompt.
        """
        probes = self._probes
        if probes is None:
            raise RuntimeError("check_info comes first")
        if scores.id != asked.id:
            raise MessageError(f"{field}.id", f"is {scores.id[:100]!r}; {asked.id[:100]!r} was asked for")
        inexact = inexact or asked.WhichOneof("form") == "text"
        if scores.inexact_ids != inexact:
            raise MessageError(f"{field}.inexact_ids", f"is {scores.inexact_ids}; of what was asked {inexact} is true")
        tokens = self._check_ids(asked, scores.completion_ids, f"{field}.completion_ids")
        prompt_tokens: int | None = 0
        if prompt is not None:
            prompt_tokens = self._check_ids(prompt, scores.prompt_ids, f"{field}.prompt_ids")
        elif scores.prompt_ids is not None or scores.prompt_texts is not None:
            raise MessageError(f"{field}.prompt_ids", "is there, on a follow-up")
        if tokens is None and asked.HasField("mask"):
            tokens = asked.mask.shape[0]
        self._check_texts(scores.completion_texts, tokens, f"{field}.completion_texts")
        if prompt is not None:
            self._check_texts(scores.prompt_texts, prompt_tokens, f"{field}.prompt_texts")
        scope = self._options.scope if prompt is not None else Scope.COMPLETION
        rows = {Scope.COMPLETION: tokens, Scope.PROMPT: prompt_tokens, Scope.ALL: _known_sum(prompt_tokens, tokens)}[scope]
        for of_reading, place in self._by_reading(scores, field):
            if of_reading.status is CompletionStatus.OK:
                found = list(of_reading.scores.values())
                probes.check_reduced(found, _selection_states(asked, scope, prompt_tokens, tokens), place)
                probes.check_tokens(found, rows, place)
        if len(scores.follow_ups) != len(asked.follow_ups):
            raise MessageError(f"{field}.follow_ups", f"has {len(scores.follow_ups)}; {len(asked.follow_ups)} were asked for")
        for index, (follow_up, answer) in enumerate(zip(asked.follow_ups, scores.follow_ups, strict=True)):
            self._check(follow_up, answer, f"{field}.follow_ups[{index}]", None, inexact=inexact)

    def _by_reading(self, scores: CompletionScores, field: str) -> Iterator[tuple[CompletionScores | ReadingScores, str]]:
        """Yields the scores of a completion on each reading that was asked for, and their paths in the response."""
        names = self._options.readings
        if not names or FROZEN in names:
            yield scores, field
        elif scores.status is not CompletionStatus.OK:
            raise MessageError(f"{field}.status", f"is {scores.status.value}, of the frozen model, which was not asked for")
        for index, of_reading in enumerate(scores.readings.values()):
            yield of_reading, f"{field}.readings[{index}]"

    def _check_ids(self, sent: HasIds, came: NDArray[np.int32] | None, field: str) -> int | None:
        """Checks that the token ids in a response are those of the request, and returns their number, or ``None`` if the number cannot be
        known because the request sent text.
        """
        if (came is not None) != self._options.return_token_ids:
            raise MessageError(field, "is missing; it was asked for" if came is None else "is there; it was not asked for")
        form = sent.WhichOneof("form")
        if form in ("text", "chat"):
            return None if came is None else len(came)
        ids = _sent_ids(sent)
        if came is not None and not np.array_equal(ids, came):
            differ = len(ids) if len(ids) != len(came) else int(np.flatnonzero(ids != came)[0])
            raise MessageError(
                field, f"has {len(came)} ids that are not the {len(ids)} that were sent, from index {differ} on at the latest"
            )
        return len(ids)

    def _check_texts(self, came: tuple[str, ...] | None, tokens: int | None, field: str) -> None:
        if not self._options.return_token_texts:
            if came is not None:
                raise MessageError(field, "is there; it was not asked for")
            return
        expected = tokens if self._probes is not None and self._probes.has_tokenizer else 0
        if expected is not None and len(came or ()) != expected:
            raise MessageError(field, f"has {len(came or ())} pieces; {expected} tokens were asked for")


def _without_completions(probe: ScoredProbe) -> ScoredProbe:
    return replace(probe, outside_calibration=()) if probe.outside_calibration else probe


def _check_names(asked: Sequence[str], came: Sequence[ScoredProbe]) -> None:
    names = [probe.key for probe in came]
    if asked and len(asked) != len(came):
        raise MessageError(
            "info.probes", f"has {len(came)}, {', '.join(names)[:500]}; {len(asked)} were asked for, {', '.join(asked)[:500]}"
        )
    if not came:
        raise MessageError("info.probes", "is empty; every loaded probe was asked for")
    for index, (name, probe) in enumerate(zip(asked, came, strict=False)):
        if name not in (probe.name, names[index]):
            raise MessageError(f"info.probes[{index}]", f"is {names[index]}; {name} was asked for")
    if len(set(names)) < len(names):
        raise MessageError("info.probes", "has the same probe twice")


class _ProbesByShape:
    """Probes of a response, arranged by the shape of their scores, so that a thousand probes of one shape are checked as one array."""

    def __init__(self, probes: Sequence[ScoredProbe], wants_tokens: Sequence[bool], *, has_tokenizer: bool) -> None:
        self.has_tokenizer = has_tokenizer
        self._keys = score_keys(probes)
        self._wants_tokens = list(wants_tokens)
        self._labels = [len(probe.labels) for probe in probes]
        self._middle = [max(len(probe.reductions), 1) for probe in probes]
        self._follow_up_tokens = [probe.follow_up_tokens for probe in probes]
        self._excludes = np.array([probe.exclude_special_tokens for probe in probes], np.bool_)
        self._follows = np.array([probe.follow_up_tokens > 0 for probe in probes], np.bool_)
        by_shape: dict[tuple[int, int], list[int]] = {}
        for index, shape in enumerate(zip(self._middle, self._labels, strict=True)):
            by_shape.setdefault(shape, []).append(index)
        self._by_shape = list(by_shape.values())
        self._shapes: dict[int, list[tuple[int, int, int]]] = {}

    def check_reduced(self, scores: Sequence[ProbeScores], selects: NDArray[np.int8], field: str) -> None:
        """Checks a completion's reduced scores (one number per label for the scope and each span, by each reduction). ``selects`` has one
        entry for the scope and one for each span, which tells whether the scope or span selects a token: 1 yes, 0 no, -1 unknown.
        """
        rows = len(selects)
        expected = self._shapes.get(rows)
        if expected is None:
            expected = self._shapes[rows] = [(rows, middle, labels) for middle, labels in zip(self._middle, self._labels, strict=True)]
        arrays = [probe.reduced for probe in scores]
        shapes = [array.shape for array in arrays]
        if shapes != expected:
            index = next(index for index, shape in enumerate(shapes) if shape != expected[index])
            problem = f"has shape {shapes[index]}; {expected[index]} was asked for: scope and spans, reductions, labels"
            raise MessageError(f"{field}.scores[{index}].reduced", problem)
        everything = bool((selects != 0).all())
        for group in self._by_shape:
            block = np.concatenate([arrays[index] for index in group] if len(group) < len(arrays) else arrays)
            if everything and not (rows > 1 and self._follows[group].any()) and np.isfinite(block).all():
                continue
            self._check_absent(block.reshape(len(group), rows, -1), selects, group, field)

    def _check_absent(self, block: NDArray[np.float32], selects: NDArray[np.int8], group: Sequence[int], field: str) -> None:
        absent = np.isnan(block)
        missing, partly = absent.all(axis=2), absent.any(axis=2)
        follows, excludes = self._follows[group][:, None], self._excludes[group][:, None]
        # a probe's own follow-up is scored as a whole, and spans are about tokens that it does not read
        whole = np.arange(len(selects)) == 0
        selected = np.where(follows, whole.astype(np.int8), selects)
        for wrong, problem in (
            (np.isinf(block).any(axis=2), "holds an infinity, though the status is OK"),
            (missing != partly, "is absent for some reductions or labels of a selection and not for others"),
            ((selected == 0) & ~missing, "has a value for a selection without a token; NaN was asked for"),
            ((selected == 1) & missing & ~excludes, "is absent, though tokens were selected"),
        ):
            if wrong.any():
                probe, row = (int(index) for index in np.argwhere(wrong)[0])
                raise MessageError(f"{field}.scores[{group[probe]}].reduced[{row}]", f"{problem}, of probe {self._keys[group[probe]]}")

    def check_tokens(self, scores: Sequence[ProbeScores], rows: int | None, field: str) -> None:
        """Checks the shapes and values of per-token scores; ``rows`` is the number of tokens whose scores were requested, or ``None`` if
        the number is unknown but the same for all probes.
        """
        arrays = [probe.tokens for probe in scores]
        there = [array is not None for array in arrays]
        if there != self._wants_tokens:
            index = next(index for index, is_there in enumerate(there) if is_there != self._wants_tokens[index])
            problem = "is there; it was not asked for" if there[index] else "is missing; it was asked for"
            raise MessageError(f"{field}.scores[{index}].tokens", f"{problem}, of probe {self._keys[index]}")
        if True not in there:
            return
        for index, array in enumerate(arrays):
            if array is None:
                continue
            own = self._follow_up_tokens[index]
            if rows is None and not own:
                rows = array.shape[0]
            expected = (own or rows, self._labels[index])
            if array.shape != expected:
                problem = f"has shape {array.shape}; {expected} was asked for: tokens, labels"
                raise MessageError(f"{field}.scores[{index}].tokens", f"{problem}, of probe {self._keys[index]}")
        if not np.isfinite(np.concatenate([array for array in arrays if array is not None], axis=None)).all():
            index = next(index for index, array in enumerate(arrays) if array is not None and not np.isfinite(array).all())
            problem = f"holds a value that is not finite, though the status is OK, of probe {self._keys[index]}"
            raise MessageError(f"{field}.scores[{index}].tokens", problem)


def _sent_ids(sent: HasIds) -> NDArray[Any]:
    return np.frombuffer(sent.ids.data, _IDS[sent.ids.dtype]) if sent.HasField("ids") else np.zeros(0, np.int32)


def _selection_states(asked: scoring_pb2.Completion, scope: Scope, prompt_tokens: int | None, tokens: int | None) -> NDArray[np.int8]:
    """Returns whether the scope (the tokens to score) of a completion, and then each of its named spans, selects at least one token, as
    int8 numbers: 1 yes, 0 no, -1 unknown.
    """
    mask = np.frombuffer(asked.mask.data, np.bool_) if asked.HasField("mask") else None
    own = _selects_any(tokens) if mask is None else int(mask.any())
    of_prompt = _selects_any(prompt_tokens)
    whole = {
        Scope.COMPLETION: own,
        Scope.PROMPT: of_prompt,
        Scope.ALL: max(own, of_prompt) if 1 in (own, of_prompt) else min(own, of_prompt),
    }
    spans = [span.end > span.start if mask is None else bool(mask[span.start : span.end].any()) for span in asked.spans]
    return np.array([whole[scope], *spans], np.int8)


def _selects_any(tokens: int | None) -> int:
    return -1 if tokens is None else int(tokens > 0)


def _known_sum(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second
