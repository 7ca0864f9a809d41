"""Values and messages: what is written reads back the same, and what breaks the contract is refused by its field."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from probescore import (
    Calibration,
    Chat,
    ChatMessage,
    Completion,
    CompletionScores,
    CompletionStatus,
    GroupScores,
    Limits,
    ModelInfo,
    OutputPer,
    ProbeInfo,
    ProbeScores,
    Reduction,
    ReductionKind,
    RolloutGroup,
    Scope,
    ScoredProbe,
    ScoreResult,
    ScoreUnit,
    ScoringInfo,
    ServerInfo,
    Span,
    Tap,
    Text,
    Usage,
    WorkerInfo,
)
from probescore.v1 import probes_pb2, scoring_pb2, tensor_pb2
from probescore.wire import (
    MessageError,
    RequestOptions,
    groups_from_request,
    options_from_request,
    options_to_proto,
    probes_from_proto,
    probes_to_proto,
    request_to_proto,
    responses,
    result_from_proto,
    result_to_proto,
    server_info_from_proto,
    server_info_to_proto,
    streamed_from_proto,
    streamed_to_proto,
)
from probescore.wire.tensors import FLOAT32, tensor_to_array


def plain(value: Any) -> Any:
    """A value with its arrays as (dtype, shape, numbers), so that == compares all of it."""
    if dataclasses.is_dataclass(value):
        return {entry.name: plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return (value.dtype, value.shape, value.tobytes())
    if isinstance(value, (tuple, list)):
        return [plain(entry) for entry in value]
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return value


# ------------------------------------------------------------------------------------------------------------------ strategies

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
counts = st.integers(0, 2**32 - 1)
ids = arrays.arrays(np.int32, st.integers(0, 6), elements=st.integers(0, 2**31 - 1))
masks = arrays.arrays(np.bool_, st.integers(0, 6))
completions = st.recursive(
    st.builds(
        Completion, tokens=ids | words, mask=st.none() | masks, spans=st.lists(st.builds(Span, words, counts, counts)).map(tuple), id=words
    ),
    lambda inner: st.builds(Completion, tokens=ids, follow_ups=st.lists(inner, max_size=2).map(tuple)),
    max_leaves=4,
)
chats = st.lists(st.builds(ChatMessage, words, words), max_size=2).map(lambda messages: Chat(tuple(messages)))
groups = st.builds(RolloutGroup, ids | st.builds(Text, words, st.booleans()) | chats, st.lists(completions, max_size=3).map(tuple))
finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def reductions(draw: st.DrawFn) -> Reduction:
    kind = draw(st.sampled_from(ReductionKind))
    if kind in (ReductionKind.TOPK_MEAN, ReductionKind.WINDOW_MAX_MEAN):
        return Reduction(kind, draw(st.integers(1, 1000)))
    if kind in (ReductionKind.EMA_MAX, ReductionKind.SOFTMAX_MEAN):
        return Reduction(kind, draw(st.floats(0.01, 1)))
    return Reduction(kind, draw(finite) if kind is ReductionKind.FRACTION_ABOVE else None)


options = st.builds(
    RequestOptions,
    probes=st.lists(words).map(tuple),
    reductions=st.lists(reductions(), max_size=3).map(tuple),
    token_scores=st.just("all") | st.lists(words).map(tuple),
    scope=st.sampled_from(Scope),
    expected_model_fingerprint=words,
    expected_tokenizer_fingerprint=words,
    return_token_ids=st.booleans(),
    return_token_texts=st.booleans(),
    priority=st.integers(-100, 100),
    run_id=words,
    step=st.none() | st.integers(-(2**63), 2**63 - 1),
)


def unique_words(size: int) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(words, min_size=size, max_size=size, unique=True).map(tuple)


@st.composite
def scored_probes(draw: st.DrawFn) -> tuple[ScoredProbe, ...]:
    several = draw(st.integers(0, 2))
    probe = st.builds(
        ScoredProbe,
        name=words,
        version=words,
        graph_sha256=words,
        manifest_sha256=words,
        unit=st.sampled_from(ScoreUnit),
        output_per=st.sampled_from(OutputPer),
        labels=st.lists(words).map(tuple),
        reductions=st.lists(reductions(), max_size=2).map(tuple),
        accepted_mismatches=st.lists(words).map(tuple),
        follow_up_tokens=st.integers(0, 2**32 - 1),
        exclude_special_tokens=st.booleans(),
    )
    return tuple(
        dataclasses.replace(draw(probe), name=name, version=version)
        for name, version in zip(draw(unique_words(several)), draw(unique_words(several)), strict=True)
    )


infos = st.builds(
    ScoringInfo,
    words,
    words,
    scored_probes(),
    st.builds(Usage, counts, counts, counts, finite, finite),
)
probe_scores = st.builds(
    ProbeScores,
    reduced=arrays.arrays(np.float32, arrays.array_shapes(min_dims=3, max_dims=3, min_side=0, max_side=3)),
    tokens=st.none() | arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=3)),
)


@st.composite
def completion_scores(draw: st.DrawFn, keys: tuple[str, ...], depth: int = 1) -> CompletionScores:
    status = draw(st.sampled_from(CompletionStatus))
    texts = st.none() | st.lists(words, min_size=1, max_size=3).map(tuple)
    return CompletionScores(
        id=draw(words),
        status=status,
        scores={key: draw(probe_scores) for key in keys} if status is CompletionStatus.OK else {},
        status_message=draw(words),
        prompt_ids=draw(st.none() | ids),
        completion_ids=draw(st.none() | ids),
        inexact_ids=draw(st.booleans()),
        follow_ups=tuple(draw(st.lists(completion_scores(keys, depth - 1), max_size=2))) if depth else (),
        prompt_texts=draw(texts),
        completion_texts=draw(texts),
    )


@st.composite
def results(draw: st.DrawFn) -> ScoreResult:
    info = draw(infos)
    scored = st.lists(completion_scores(tuple(probe.name for probe in info.probes)), max_size=2).map(tuple)
    return ScoreResult(tuple(draw(st.lists(st.builds(GroupScores, scored), max_size=2))), info)


calibrations = st.builds(Calibration, finite, finite, finite, finite, counts, words, st.none() | reductions(), words)
taps = st.builds(Tap, words, st.none() | st.integers(0, 100))
probe_infos = st.builds(
    ProbeInfo,
    name=words,
    version=words,
    description=words,
    graph_sha256=words,
    manifest_sha256=words,
    taps=st.lists(taps, max_size=2).map(tuple),
    unit=st.sampled_from(ScoreUnit),
    output_per=st.sampled_from(OutputPer),
    labels=st.lists(words, max_size=2).map(tuple),
    default_reduction=st.none() | reductions(),
    calibrations=st.lists(calibrations, max_size=2).map(tuple),
    accepted_mismatches=st.lists(words, max_size=2).map(tuple),
    manifest_json=words,
)
server_infos = st.builds(
    ServerInfo,
    words,
    st.builds(ModelInfo, words, words, words, words, counts, counts, counts, counts, counts),
    words,
    st.builds(Limits, counts, counts, counts, counts, counts),
    st.lists(st.builds(WorkerInfo, words, words, words, st.booleans(), counts), max_size=2).map(tuple),
    st.lists(words, max_size=2).map(tuple),
)


# --------------------------------------------------------------------------------------------------------------- round trips


@given(st.lists(groups, max_size=3), options)
def test_a_request_reads_back_as_it_was_written(sent: list[RolloutGroup], chosen: RequestOptions) -> None:
    request = scoring_pb2.ScoreRequest.FromString(request_to_proto(sent, chosen).SerializeToString())

    assert plain(groups_from_request(request)) == plain(sent)
    assert options_from_request(request) == chosen


@given(results())
def test_a_result_reads_back_as_it_was_written(result: ScoreResult) -> None:
    message = scoring_pb2.ScoreResponse.FromString(result_to_proto(result).SerializeToString())

    assert plain(result_from_proto(message)) == plain(result)


@given(results(), st.data())
def test_a_streamed_message_reads_back_as_it_was_written(result: ScoreResult, data: st.DataObject) -> None:
    scored = [(data.draw(counts), data.draw(counts), completion) for group in result.groups for completion in group]

    read = streamed_from_proto(streamed_to_proto(scored, result.info))

    assert [plain((entry.group_index, entry.completion_index, entry.scores)) for entry in read] == plain(scored)
    assert all(entry.info == result.info for entry in read)


@given(server_infos)
def test_server_info_reads_back_as_it_was_written(info: ServerInfo) -> None:
    assert server_info_from_proto(server_info_to_proto(info)) == info


@given(st.lists(probe_infos, max_size=2))
def test_probe_infos_read_back_as_they_were_written(probes: list[ProbeInfo]) -> None:
    assert probes_from_proto(probes_to_proto(probes)) == tuple(probes)


NAMED = ScoredProbe("cheating", "1", "", "", ScoreUnit.LOGIT, OutputPer.TOKEN, ("cheating",), (Reduction.parse("mean"),))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda probe: setattr(probe, "unit", 99), "info.probes[1].unit"),
        (lambda probe: setattr(probe.reductions[0], "kind", 99), "info.probes[1].reductions[0].kind"),
    ],
)
def test_what_is_wrong_with_a_probes_name_is_told_however_often_it_comes(change: Callable[[Any], None], field: str) -> None:
    message = result_to_proto(ScoreResult((), ScoringInfo("", "", (NAMED, NAMED))))
    change(message.info.probes[1])
    for _ in range(2):
        with pytest.raises(MessageError) as refused:
            result_from_proto(message)
        assert refused.value.field == field


def test_whoever_changes_an_answer_changes_no_other() -> None:
    result = ScoreResult((), ScoringInfo("", "", (NAMED,)))
    result_to_proto(result).info.probes[0].name = "changed"
    assert result_to_proto(result).info.probes[0].name == "cheating"


def test_a_thousand_reductions_that_a_client_chose_are_not_remembered() -> None:
    many = dataclasses.replace(NAMED, reductions=NAMED.reductions * 1000)
    before = responses._known_probe_to_proto.cache_info().currsize

    message = result_to_proto(ScoreResult((), ScoringInfo("", "", (many,))))

    assert len(message.info.probes[0].reductions) == 1000
    assert responses._known_probe_to_proto.cache_info().currsize == before


def test_scores_of_two_versions_of_one_probe_stay_apart() -> None:
    versions = [
        ScoredProbe("cheating", version, "", "", ScoreUnit.LOGIT, OutputPer.TOKEN, ("cheating",), (Reduction.parse("mean"),))
        for version in ("1", "2")
    ]
    scores = {f"cheating@{version}": ProbeScores(np.full((1, 1, 1), version, np.float32)) for version in (1, 2)}
    scored = CompletionScores("", CompletionStatus.OK, scores)

    read = result_from_proto(result_to_proto(ScoreResult((GroupScores((scored,)),), ScoringInfo("", "", tuple(versions)))))

    assert {key: entry.value for key, entry in read.groups[0][0].scores.items()} == {"cheating@1": 1, "cheating@2": 2}


# --------------------------------------------------------------------------------------------------------------- as users write


@pytest.mark.parametrize("written", [[5, 6], (5, 6), np.array([5, 6], np.uint8), np.array([5, 6], np.int64), np.array([5, 6], ">i4")])
def test_ids_may_be_any_integers_in_one_dimension(written: Any) -> None:
    request = request_to_proto([RolloutGroup(written, [written])], RequestOptions())

    read = groups_from_request(request)[0]
    assert plain(read.prompt) == plain(np.array([5, 6], np.int32))
    assert plain(read.completions[0].tokens) == plain(np.array([5, 6], np.int32))


def test_ids_above_int32_are_sent_as_they_are() -> None:
    read = groups_from_request(request_to_proto([RolloutGroup([2**31, 2**40], [])], RequestOptions()))[0]

    assert plain(read.prompt) == plain(np.array([2**31, 2**40], np.int64))


@pytest.mark.parametrize("written", [[1, 0, 1], [True, False, True], np.array([1.0, 0.0, 1.0]), np.array([1, 0, 1], np.int64)])
def test_a_mask_may_be_any_zeros_and_ones(written: Any) -> None:
    request = request_to_proto([RolloutGroup([], [Completion([1, 2, 3], mask=written)])], RequestOptions())

    assert groups_from_request(request)[0].completions[0].mask.tolist() == [True, False, True]


def test_a_prompt_written_as_text_is_tokenised_without_special_tokens() -> None:
    assert groups_from_request(request_to_proto([RolloutGroup("hello", ["x"])], RequestOptions()))[0].prompt == Text("hello", False)


DEEP = Completion([1])
for _ in range(9):
    DEEP = Completion([1], follow_ups=(DEEP,))


@pytest.mark.parametrize(
    ("group", "field", "problem"),
    [
        (RolloutGroup([[1, 2]], []), "groups[0].prompt.ids", "has 2 axes; expected 1"),
        (RolloutGroup([0.5], []), "groups[0].prompt.ids", "token ids are integers, got float64"),
        (RolloutGroup([1], [[None]]), "groups[0].completions[0].ids", "token ids are integers, got object"),
        (RolloutGroup([1], [[1], [[1], [2, 3]]]), "groups[0].completions[1].ids", "not an array"),
        (RolloutGroup([-(2**40)], []), "groups[0].prompt.ids", "token id -1099511627776 is out of range"),
        (RolloutGroup(np.array([2**64 - 1], np.uint64), []), "groups[0].prompt.ids", "token id 18446744073709551615 is out of range"),
        (RolloutGroup("\ud800", []), "groups[0].prompt.text.text", "lone surrogate at index 0"),
        (RolloutGroup(Chat((ChatMessage("user", None),)), []), "groups[0].prompt.chat.messages[0].content", "expected str, got NoneType"),
        (RolloutGroup([], [Completion([1], mask=[2])]), "groups[0].completions[0].mask", "a mask holds 0 and 1 only"),
        (RolloutGroup([], [Completion([1], mask=[[1]])]), "groups[0].completions[0].mask", "has 2 axes; expected 1"),
        (
            RolloutGroup([], [Completion([1], spans=(Span("a", -1, 1),))]),
            "groups[0].completions[0].spans[0].start",
            "-1 is not between 0 and",
        ),
        (
            RolloutGroup([], [Completion([1], spans=(Span("a", 0, 1.5),))]),
            "groups[0].completions[0].spans[0].end",
            "expected an integer, got float",
        ),
        (RolloutGroup([], [DEEP]), "groups[0].completions[0]" + ".follow_ups[0]" * 9, "follow-ups nest more than 8 deep"),
    ],
)
def test_a_value_that_cannot_be_sent_is_named(group: RolloutGroup, field: str, problem: str) -> None:
    with pytest.raises(MessageError) as raised:
        request_to_proto([group], RequestOptions())

    assert raised.value.field == field
    assert problem in raised.value.problem
    assert str(raised.value) == f"{field}: {raised.value.problem}"


@pytest.mark.parametrize(
    ("chosen", "field"),
    [
        (RequestOptions(priority=2**31), "priority"),
        (RequestOptions(step=2**63), "step"),
        (RequestOptions(probes=("a", 3)), "probes[1]"),
        (RequestOptions(token_scores=("\udfff",)), "token_scores.probes[0]"),
        (RequestOptions(run_id=b"run"), "run_id"),
    ],
)
def test_an_option_that_cannot_be_sent_is_named(chosen: RequestOptions, field: str) -> None:
    with pytest.raises(MessageError) as raised:
        options_to_proto(chosen)
    assert raised.value.field == field


# ----------------------------------------------------------------------------------------------------------- as an attacker writes

INT32 = tensor_pb2.DATA_TYPE_INT32
BOOL = tensor_pb2.DATA_TYPE_BOOL


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (tensor_pb2.Tensor(), "dtype is DATA_TYPE_UNSPECIFIED; expected DATA_TYPE_INT32 or DATA_TYPE_INT64 or DATA_TYPE_UINT32"),
        (tensor_pb2.Tensor(dtype=FLOAT32, shape=[1], data=bytes(4)), "dtype is DATA_TYPE_FLOAT32"),
        (tensor_pb2.Tensor(dtype=99, shape=[1], data=bytes(4)), "dtype is 99"),
        (tensor_pb2.Tensor(dtype=INT32, data=bytes(4)), "shape has 0 axes; expected 1"),
        (tensor_pb2.Tensor(dtype=INT32, shape=[1] * 1000, data=bytes(4)), "shape has 1000 axes; expected 1"),
        (tensor_pb2.Tensor(dtype=INT32, shape=[-1], data=bytes(4)), "shape [-1] has a negative axis"),
        (tensor_pb2.Tensor(dtype=INT32, shape=[2], data=bytes(4)), "data has 4 bytes; shape [2] of DATA_TYPE_INT32 needs 8"),
        (tensor_pb2.Tensor(dtype=INT32, shape=[1], data=bytes(5)), "data has 5 bytes"),
        (tensor_pb2.Tensor(dtype=INT32, shape=[2**31]), "data has 0 bytes; shape [2147483648]"),
        # 2^62 × 4 bytes wraps around to 0 in 64 bits
        (tensor_pb2.Tensor(dtype=INT32, shape=[2**62]), "data has 0 bytes"),
    ],
)
def test_ids_that_break_the_contract_are_named(tensor: tensor_pb2.Tensor, problem: str) -> None:
    follow_up = scoring_pb2.Completion(follow_ups=[scoring_pb2.Completion(), scoring_pb2.Completion(ids=tensor)])
    group = scoring_pb2.RolloutGroup(completions=[follow_up])
    request = scoring_pb2.ScoreRequest(groups=[scoring_pb2.RolloutGroup(), group])

    with pytest.raises(MessageError) as raised:
        groups_from_request(request)

    assert raised.value.field == "groups[1].completions[0].follow_ups[1].ids"
    assert problem in raised.value.problem


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        (tensor_pb2.Tensor(dtype=INT32, shape=[1], data=bytes(4)), "dtype is DATA_TYPE_INT32; expected DATA_TYPE_BOOL"),
        (tensor_pb2.Tensor(dtype=BOOL, shape=[3], data=b"\0\1\2"), "data holds a byte of value 2; a bool is 0 or 1"),
    ],
)
def test_a_mask_that_breaks_the_contract_is_named(mask: tensor_pb2.Tensor, problem: str) -> None:
    completions = [scoring_pb2.Completion(), scoring_pb2.Completion(mask=mask)]

    with pytest.raises(MessageError) as raised:
        groups_from_request(scoring_pb2.ScoreRequest(groups=[scoring_pb2.RolloutGroup(completions=completions)]))

    assert raised.value.field == "groups[0].completions[1].mask"
    assert problem in raised.value.problem


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4), st.integers(0, 7), st.binary(max_size=32), st.integers(0, 4))
def test_no_tensor_makes_the_reader_fail_in_another_way(shape: list[int], dtype: int, data: bytes, rank: int) -> None:
    tensor = tensor_pb2.Tensor(dtype=dtype, shape=shape, data=data)

    try:
        array = tensor_to_array(tensor, "x", (FLOAT32, INT32, BOOL), rank)
    except MessageError:
        return
    assert list(array.shape) == shape
    assert array.nbytes == len(data)


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((2**31,), "needs 8589934592"),
        ((2**62,), "needs 18446744073709551616"),
        ((2**32, 2**32), "needs 73786976294838206464"),
        ((0, 2**62), "too large"),
        ((2**63 - 1, 0, 2), "too large"),
    ],
)
def test_a_large_shape_allocates_nothing(shape: tuple[int, ...], problem: str) -> None:
    tensor = tensor_pb2.Tensor(dtype=FLOAT32, shape=shape)
    tracemalloc.start()
    with pytest.raises(MessageError, match=problem):
        tensor_to_array(tensor, "x", (FLOAT32,), len(shape))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 1_000_000


@given(st.binary(max_size=200))
def test_no_parsed_request_makes_the_reader_fail_in_another_way(data: bytes) -> None:
    request = scoring_pb2.ScoreRequest()
    try:
        request.ParseFromString(data)
    except Exception:
        return
    for read in (groups_from_request, options_from_request):
        try:
            read(request)
        except MessageError:
            continue


def test_a_list_of_ids_and_absent_forms_are_read() -> None:
    prompt = scoring_pb2.Prompt(id_list=tensor_pb2.TokenIds(ids=[7, 2**32 - 1]))
    group = scoring_pb2.RolloutGroup(prompt=prompt, completions=[scoring_pb2.Completion()])

    with_list, empty = groups_from_request(scoring_pb2.ScoreRequest(groups=[group, scoring_pb2.RolloutGroup()]))

    assert with_list.prompt.tolist() == [7, 2**32 - 1]
    assert with_list.completions[0].tokens.shape == (0,)
    assert empty.prompt.shape == (0,)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (scoring_pb2.ScoreRequest(scope=9), "scope"),
        (scoring_pb2.ScoreRequest(reductions=[probes_pb2.Reduction()]), "reductions[0].kind"),
        (scoring_pb2.ScoreRequest(reductions=[probes_pb2.Reduction(kind=1), probes_pb2.Reduction(kind=77)]), "reductions[1].kind"),
        (scoring_pb2.ScoreRequest(reductions=[probes_pb2.Reduction(kind=6)]), "reductions[0].parameter"),
        (scoring_pb2.ScoreRequest(reductions=[probes_pb2.Reduction(kind=1, parameter=2)]), "reductions[0].parameter"),
        (scoring_pb2.ScoreRequest(reductions=[probes_pb2.Reduction(kind=7, parameter=float("nan"))]), "reductions[0].parameter"),
        (scoring_pb2.ScoreRequest(token_scores=scoring_pb2.TokenScores(all=True, probes=["a"])), "token_scores.probes"),
    ],
)
def test_an_option_that_breaks_the_contract_is_named(request_: scoring_pb2.ScoreRequest, field: str) -> None:
    with pytest.raises(MessageError) as raised:
        options_from_request(request_)
    assert raised.value.field == field


def test_an_unspecified_scope_means_the_completion() -> None:
    assert options_from_request(scoring_pb2.ScoreRequest()) == RequestOptions(scope=Scope.COMPLETION)


@pytest.mark.parametrize(
    ("scored", "field"),
    [
        (scoring_pb2.CompletionScores(), "status"),
        (scoring_pb2.CompletionScores(status=1, scores=[scoring_pb2.ProbeScores()]), "scores"),
        (scoring_pb2.CompletionScores(status=2, prompt_ids=tensor_pb2.Tensor()), "prompt_ids"),
    ],
)
def test_an_answer_that_breaks_the_contract_is_named(scored: scoring_pb2.CompletionScores, field: str) -> None:
    with pytest.raises(MessageError) as raised:
        result_from_proto(scoring_pb2.ScoreResponse(groups=[scoring_pb2.GroupScores(completions=[scored])]))
    assert raised.value.field == f"groups[0].completions[0].{field}"


def test_arrays_of_an_answer_cannot_be_written_to() -> None:
    scored = CompletionScores("", CompletionStatus.NON_FINITE, {}, completion_ids=np.arange(3, dtype=np.int32))
    read = result_from_proto(result_to_proto(ScoreResult((GroupScores((scored,)),), ScoringInfo("", "", ()))))

    with pytest.raises(ValueError, match="read-only"):
        read.groups[0][0].completion_ids[0] = 1
