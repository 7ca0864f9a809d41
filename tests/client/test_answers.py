"""A server that lies, or mixes requests up: whatever field of a right answer is changed, the client says so, or the field is free."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import INFO, PROBES, SPECIAL_ID, Service, answer, answer_in_pieces, group, scored_groups

from probescore import (
    Chat,
    ChatMessage,
    Completion,
    CompletionStatus,
    GroupScores,
    MismatchError,
    OutputPer,
    ProbescoreError,
    Reduction,
    RolloutGroup,
    Scope,
    ScoredProbe,
    ScoreResult,
    ScoreUnit,
    ServerError,
    Span,
    Text,
)
from probescore._client import score_request, score_result
from probescore._options import ScoreOptions
from probescore.types import CompletionScores, ProbeScores
from probescore.v1 import scoring_pb2
from probescore.wire import result_to_proto

NAMES = [f"{probe.name}@{probe.version}" for probe in PROBES]
FOLLOW_UP = Completion([21, 22], id="why", follow_ups=(Completion([23, 24, 25], id="really"),))
GROUPS = [
    RolloutGroup(
        [1, 2, 3],
        [
            Completion([4, 5, 6, 8], id="a", mask=[0, 1, 1, 0], spans=(Span("x", 0, 2), Span("y", 2, 4)), follow_ups=(FOLLOW_UP,)),
            Completion([9, 10], id="b"),
        ],
    ),
    RolloutGroup([11, 12], [Completion([13, 14, 15], id="c", spans=(Span("x", 1, 2),))]),
]

EVERYTHING: ScoreOptions = {
    "probes": NAMES,
    "reductions": ["mean", "topk_mean(2)"],
    "token_scores": "all",
    "expected_model_fingerprint": INFO.model_fingerprint,
    "expected_tokenizer_fingerprint": INFO.tokenizer_fingerprint,
    "return_token_ids": True,
    "return_token_texts": True,
}
NOTHING: ScoreOptions = {"probes": ["sum", "pair", "pooled", "followed"]}
SOME: ScoreOptions = {"probes": ["pair", "sum"], "reductions": "max", "token_scores": ["sum"], "return_token_ids": True}

# what no client can know; the rest is checked, whatever was asked
FREE = {
    "info.usage",
    "info.probes.graph_sha256",
    "info.probes.manifest_sha256",
    "info.probes.unit",
    "info.probes.labels",
    "info.probes.accepted_mismatches",
    "info.probes.exclude_special_tokens",
    "scores.reduced.data",
    "scores.tokens.data",
    "status_message",
    "prompt_texts",
    "completion_texts",
}
# what can only be known if it was asked for
FREE_UNLESS_ASKED = {
    "info.model_fingerprint",
    "info.tokenizer_fingerprint",
    "info.probes.version",
    "info.probes.reductions",
    "info.probes.follow_up_tokens",
    "scores",  # two probes of the same shape, exchanged
}


def request_for(options: ScoreOptions, scope: str = "completion") -> scoring_pb2.ScoreRequest:
    groups = GROUPS
    if scope == "prompt":
        plain = [Completion(each.tokens, id=each.id, follow_ups=each.follow_ups) for each in GROUPS[0].completions]  # type: ignore[union-attr]
        groups = [RolloutGroup(GROUPS[0].prompt, plain), RolloutGroup([11, 12], [Completion([13, 14, 15], id="c")])]
    return score_request(groups, {**options, "scope": scope})


def mutations(message: Message, path: str = "") -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Every change of one field of a message: its path, what changes, and how to do it. Changes are made in place."""
    for field in message.DESCRIPTOR.fields:
        where = f"{path}.{field.name}" if path else field.name
        value = getattr(message, field.name)
        if field.is_repeated if hasattr(field, "is_repeated") else field.label == FieldDescriptor.LABEL_REPEATED:
            yield from repeated_mutations(value, where, field)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            if message.HasField(field.name):
                yield where, "cleared", lambda name=field.name: message.ClearField(name)  # type: ignore[misc]
                yield from mutations(value, where)
            else:
                yield where, "set", value.SetInParent
        else:
            for what, other in others(value, field):
                yield where, what, lambda name=field.name, other=other: setattr(message, name, other)  # type: ignore[misc]


def repeated_mutations(values: Any, where: str, field: FieldDescriptor) -> Iterator[tuple[str, str, Callable[[], None]]]:
    entries = list(values)
    if entries:
        yield where, "the last removed", lambda: values.__delitem__(len(entries) - 1)
        yield where, "the first removed", lambda: values.__delitem__(0)
        yield where, "the last twice", lambda: values.extend(entries[-1:])
    if len(entries) > 1 and entries[0] != entries[1]:
        yield where, "exchanged", lambda: refill(values, [entries[1], entries[0], *entries[2:]])
    for index, entry in enumerate(entries):
        if isinstance(entry, Message):
            yield from mutations(values[index], where)
        else:
            for what, other in others(entry, field):
                yield where, f"[{index}] {what}", lambda index=index, other=other: values.__setitem__(index, other)  # type: ignore[misc]
    if not entries and field.type != FieldDescriptor.TYPE_MESSAGE:
        yield where, "one more", lambda: values.append(others_of_nothing(field))


def refill(values: Any, entries: list[Any]) -> None:
    copies = [type(entry).FromString(entry.SerializeToString()) if isinstance(entry, Message) else entry for entry in entries]
    del values[:]
    values.extend(copies)


def others_of_nothing(field: FieldDescriptor) -> Any:
    return "x" if field.type == FieldDescriptor.TYPE_STRING else 1


def others(value: Any, field: FieldDescriptor) -> list[tuple[str, Any]]:
    """Other values of a field, each with what changed."""
    if isinstance(value, bytes):
        ends = {"NaN": np.nan, "infinite": np.inf, "-infinite": -np.inf, "finite": 12345.0} if value else {}
        ended = {f"now {name}": value[:-4] + np.float32(number).tobytes() for name, number in ends.items()}
        changed = {**ended, "now shorter": value[:-4], "now longer": value + b"1234"}
        return [(what, other) for what, other in changed.items() if other != value]
    if field.enum_type is not None:
        found: list[Any] = [*(number for number in field.enum_type.values_by_number if number != value), 99]
    elif isinstance(value, bool):
        found = [not value]
    elif isinstance(value, str):
        found = [f"{value}x", *([""] if value else [])]
    else:
        found = [value + 1, *([value - 1] if value else [])]
    return [(f"{value!r} → {other!r}", other) for other in found]


def is_free(path: str, change: str, options: ScoreOptions) -> bool:
    plain = re.sub(r"^groups\.completions\.|follow_ups\.", "", path)
    if plain in ("scores.reduced.data", "scores.tokens.data"):
        return change == "now finite"
    if plain.endswith("sha256") and change.endswith("''"):
        return False
    if plain == "info.probes.unit" and change.endswith((" 0", " 99")):
        return False
    if plain == "info.probes.labels" and ("removed" in change or "twice" in change):
        return False
    if plain in ("prompt_texts", "completion_texts"):
        return ("return_token_texts" in options and " → " in change) or change == "exchanged"
    if any(plain == free or plain.startswith(f"{free}.") for free in FREE):
        return True
    if plain == "info.model_fingerprint" and change.endswith("''"):
        return False
    if options is EVERYTHING:
        return False
    if plain == "scores":
        return change == "exchanged"
    if plain == "info.probes.reductions":
        return False
    if plain.startswith("info.probes.reductions."):
        return "reductions" not in options and not change.endswith((" 0", " 99"))
    return plain in FREE_UNLESS_ASKED


def refused(request: scoring_pb2.ScoreRequest, response: scoring_pb2.ScoreResponse) -> ProbescoreError | None:
    try:
        score_result(response, request)
    except (ServerError, MismatchError) as error:
        return error
    return None


@pytest.mark.parametrize("scope", ["completion", "all", "prompt"])
@pytest.mark.parametrize("options", [EVERYTHING, NOTHING, SOME], ids=["everything", "nothing", "some"])
def test_a_right_answer_changed_in_any_one_field_is_refused(options: ScoreOptions, scope: str) -> None:
    request = request_for(options, scope)
    right = answer(request)
    assert refused(request, right) is None
    changes = list(mutations(right))
    believed = []
    for index, (path, change, _) in enumerate(changes):
        # all of them where the scope is the usual one, else one in five
        if is_free(path, change, options) or (scope != "completion" and index % 5):
            continue
        if scope == "prompt" and path == "info.probes.follow_up_tokens":  # without spans it shows in per-token scores only
            continue
        wrong = type(right).FromString(right.SerializeToString())
        next(islice(mutations(wrong), index, None))[2]()
        error = refused(request, wrong)
        if error is None:
            believed.append(f"{path}: {change}")
        else:
            assert isinstance(error, MismatchError) or error.reason == "MALFORMED_ANSWER"
    assert believed == []
    assert len(changes) > 300


@pytest.mark.parametrize("seed", range(20))
def test_a_changed_answer_is_refused_by_both_clients_on_the_wire(client: Any, service: Service, seed: int) -> None:
    chosen = random.Random(seed)

    def change(message: Message) -> None:
        possible = [
            (path, make)
            for path, change, make in mutations(message)
            if not is_free(re.sub(r"^completions\.scores\.", "", path), change, EVERYTHING)
        ]
        chosen.choice(possible)[1]()

    def lying(request: Any) -> Any:
        message = answer(request)
        change(message)
        return message

    def lying_in_pieces(request: Any) -> Iterator[Any]:
        pieces = list(answer_in_pieces(request))
        change(chosen.choice(pieces))
        yield from pieces

    service.script = [lying, lying_in_pieces]
    with pytest.raises((ServerError, MismatchError)):
        client.score(GROUPS, **EVERYTHING)
    with pytest.raises((ServerError, MismatchError)):
        list(client.score_stream(GROUPS, **EVERYTHING))
    assert len(service.requests) == 2  # and no retry hides it


# --------------------------------------------------------------------------------------------------- right answers that look strange

TOKENS = st.one_of(st.lists(st.integers(1, 9), max_size=5), st.just([]), st.just([SPECIAL_ID]), st.text("abc", max_size=4))
PROMPTS = st.one_of(
    TOKENS.filter(lambda tokens: isinstance(tokens, list)),
    st.builds(Text, st.text("abc", max_size=3)),
    st.builds(lambda text: Chat((ChatMessage("user", text),)), st.text("abc", max_size=3)),
)


@st.composite
def completions(draw: Any, scope: str, depth: int = 0) -> Completion:
    tokens = draw(TOKENS)
    bare = scope == "prompt" and depth == 0
    mask = None if bare else draw(st.none() | st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    ends = st.integers(0, len(tokens))
    pairs = [] if bare else draw(st.lists(st.tuples(ends, ends), max_size=3))
    spans = tuple(Span(str(index), min(pair), max(pair)) for index, pair in enumerate(pairs))
    follow_ups = tuple(draw(st.lists(completions(scope, depth + 1), max_size=2 - depth))) if depth < 2 else ()
    return Completion(
        tokens, mask=None if mask is None else np.array(mask, bool), spans=spans, follow_ups=follow_ups, id=draw(st.sampled_from(["", "a"]))
    )


@st.composite
def calls(draw: Any) -> tuple[list[RolloutGroup], ScoreOptions]:
    scope = draw(st.sampled_from(["completion", "prompt", "all"]))
    groups = [
        RolloutGroup(draw(PROMPTS), draw(st.lists(completions(scope), min_size=1, max_size=3))) for _ in range(draw(st.integers(1, 2)))
    ]
    names = draw(st.lists(st.sampled_from(PROBES), min_size=0, max_size=4, unique_by=lambda probe: probe.name))
    options: ScoreOptions = {
        "scope": scope,
        "probes": [draw(st.sampled_from([probe.name, f"{probe.name}@{probe.version}"])) for probe in names],
        "reductions": draw(st.lists(st.sampled_from(["mean", "last", "topk_mean(2)"]), max_size=2)),
        "token_scores": draw(st.booleans()),
        "return_token_ids": draw(st.booleans()),
        "return_token_texts": draw(st.booleans()),
    }
    return groups, options


@given(calls())
def test_no_right_answer_is_refused(call: tuple[list[RolloutGroup], ScoreOptions]) -> None:
    request = score_request(*call)
    score_result(answer(request), request)


# ----------------------------------------------------------------------------------------------------------------- what is said


def lie(options: ScoreOptions, change: Callable[[scoring_pb2.ScoreResponse], None]) -> str:
    request = request_for(options)
    message = answer(request)
    change(message)
    return str(refused(request, message))


def test_an_error_names_what_was_asked_and_what_came() -> None:
    said = lie(
        SOME,
        lambda message: (
            message.info.probes[0].reductions[0].ClearField("parameter") or setattr(message.info.probes[0].reductions[0], "kind", 1)
        ),
    )
    assert said.endswith("info.probes[0].reductions: is mean; max was asked for")
    said = lie(SOME, lambda message: setattr(message.groups[0].completions[1], "id", "z"))
    assert said.endswith("groups[0].completions[1].id: is 'z'; 'b' was asked for")
    said = lie(SOME, lambda message: message.groups[1].completions.pop() and None)
    assert said.endswith("groups[1].completions: has 0; 1 were asked for")
    said = lie(EVERYTHING, lambda message: setattr(message.info, "model_fingerprint", "sha256:other"))
    assert said == "expected_model_fingerprint: the server runs sha256:other, the request expects sha256:model"


def test_an_absent_value_is_believed_only_where_nothing_may_be_selected() -> None:
    request = request_for({"probes": ["sum", "pair"]})
    nothing = np.full((1, 1, 1), np.nan, np.float32).tobytes()
    message = answer(request)
    message.groups[0].completions[1].scores[0].reduced.data = nothing
    assert "is absent, though tokens were selected, of probe sum" in str(refused(request, message))
    # a probe that leaves special tokens out may have nothing left, of all labels together
    message = answer(request)
    message.groups[0].completions[1].scores[1].reduced.data = nothing * 2
    assert refused(request, message) is None
    message.groups[0].completions[1].scores[1].reduced.data = nothing + np.float32(1).tobytes()
    assert "is absent for some reductions or labels" in str(refused(request, message))


@pytest.mark.parametrize(
    "completion", [Completion([]), Completion([1, 2], mask=[0, 0]), Completion([1, 2], mask=[1, 0], spans=(Span("s", 1, 2),))]
)
def test_a_value_for_a_selection_of_nothing_is_not_believed(completion: Completion) -> None:
    request = score_request([RolloutGroup([5], [completion])], {"probes": ["sum", "pooled"]})
    for probe in (0, 1):
        message = answer(request)
        reduced = message.groups[0].completions[0].scores[probe].reduced
        reduced.data = reduced.data[:-4] + np.float32(0).tobytes()
        assert "has a value for a selection without a token" in str(refused(request, message))


def test_messages_of_one_stream_must_be_of_one_model(client: Any, service: Service) -> None:
    def mixed(request: Any) -> Iterator[Any]:
        for number, message in enumerate(answer_in_pieces(request)):
            message.info.model_fingerprint = f"sha256:{number}"
            yield message

    service.script = [mixed]
    with pytest.raises(ServerError, match="is another than in the call's first message"):
        list(client.score_stream([group([1], [2])]))


def test_a_completion_without_scores_keeps_its_place_and_ids(client: Any, service: Service) -> None:
    def broken(request: Any) -> Any:
        message = answer(request)
        message.groups[0].completions[0].status = 2
        del message.groups[0].completions[0].scores[:]
        return message

    service.script = [broken]
    result = client.score([group([1], [2])], return_token_ids=True)
    assert result.groups[0][0].status is CompletionStatus.NON_FINITE
    assert result.values("sum").tolist()[1:] == [2]


# ---------------------------------------------------------------------------------------------------------------------- what it costs


def test_a_thousand_probes_are_checked_in_a_fraction_of_the_time_that_reading_them_takes() -> None:
    probes = tuple(
        ScoredProbe(f"p{number}", "1", "sha256:g", "sha256:m", ScoreUnit.LOGIT, OutputPer.TOKEN, ("score",), (Reduction.parse("mean"),))
        for number in range(1024)
    )
    request = score_request([group(*([5] for _ in range(32)))], {})
    scores = {probe.name: ProbeScores(np.ones((1, 1, 1), np.float32)) for probe in probes}
    result = ScoreResult((GroupScores(tuple(CompletionScores("", CompletionStatus.OK, scores) for _ in range(32))),), _with(probes))
    message = result_to_proto(result)

    from probescore._answers import AnswerCheck
    from probescore.wire import result_from_proto

    def seconds(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(5):
            began = time.process_time()
            work()
            times.append(time.process_time() - began)
        return min(times)

    read = result_from_proto(message)
    reading, checking = seconds(lambda: result_from_proto(message)), seconds(lambda: AnswerCheck(request).check_result(read))
    print(f"read in {reading:.3f} s, checked in {checking:.3f} s")
    assert checking < reading / 2


def _with(probes: tuple[ScoredProbe, ...]) -> Any:
    from dataclasses import replace

    return replace(INFO, probes=probes)


def test_the_scripted_server_scores_as_it_says() -> None:
    request = request_for({"probes": ["sum"]}, Scope.ALL.value)
    assert scored_groups(request)[0][1].scores["sum"].value == 1 + 2 + 3 + 9 + 10
