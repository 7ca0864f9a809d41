"""Activations out of the engine: pools against numpy, scopes, masks, spans and follow-ups, bounds, cancellation, faults."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_probes import linear
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BOS, HIDDEN_SIZE, LAYERS, VOCAB_SIZE, tiny_model
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from probescore.types import Chat, Completion, CompletionActivations, CompletionStatus, RolloutGroup, Scope, Span, Tap, Text
from probescore_probes.reference import ReferenceModel
from probescore_server import Engine
from probescore_server.backbone.base import Activations
from probescore_server.errors import InvalidRequest, LimitExceeded

TAPS = ("resid_post.1", "attn_out.2", "final_norm")
POOLS = ("mean", "last", "max", "tokens")
BROKEN = 90
ROW_BYTES = HIDDEN_SIZE * 4

Array = NDArray[np.float32]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(str(tiny_model()), taps="*")


# ------------------------------------------------------------------------------------------------------------- against plain numpy

ids = st.lists(st.integers(4, VOCAB_SIZE - 1), max_size=8)


@st.composite
def completions(draw: st.DrawFn, depth: int = 2) -> Completion:
    tokens = draw(ids)
    mask = draw(st.none() | st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    bounds = draw(st.lists(st.tuples(st.integers(0, len(tokens)), st.integers(0, len(tokens))), max_size=2))
    follow_ups = draw(st.lists(completions(depth=depth - 1), max_size=2)) if depth else []
    spans = tuple(Span(f"span-{index}", *sorted(pair)) for index, pair in enumerate(bounds))
    return Completion(tokens, mask=mask, spans=spans, follow_ups=tuple(follow_ups), id=draw(st.sampled_from(["", "a", "b"])))


groups = st.lists(st.builds(RolloutGroup, ids, st.lists(completions(), min_size=1, max_size=4)), min_size=1, max_size=3)


def expected_pools(rows: Array, selection: NDArray[np.bool_]) -> list[Array]:
    """Mean, last and max of the rows that are selected, by numpy; NaN if there is none."""
    chosen = rows[selection].astype(np.float64)
    if not len(chosen):
        return [np.full(HIDDEN_SIZE, np.nan)] * 3
    return [chosen.mean(axis=0), chosen[-1], chosen.max(axis=0)]


@settings(max_examples=60)
@given(asked=groups, scope=st.sampled_from(Scope), rows=st.integers(200, 1000))
def test_any_selection_is_what_numpy_takes_of_plain_activations(
    engine: Engine, reference: ReferenceModel, asked: list[RolloutGroup], scope: Scope, rows: int
) -> None:
    scale = {tap: reference.activations(np.arange(4, 90), [tap])[Tap(*parsed(tap))].std() for tap in TAPS}

    def check(found: CompletionActivations, completion: Completion, before: list[int], *, is_follow_up: bool) -> None:
        own = list(completion.tokens)  # type: ignore[arg-type]
        first = len(before) if is_follow_up or scope is Scope.COMPLETION else 0
        last = len(before) if scope is Scope.PROMPT and not is_follow_up else len(before) + len(own)
        assert found.id == completion.id
        assert found.spans == tuple(span.name for span in completion.spans)
        np.testing.assert_array_equal(found.token_ids, (before + own)[first:last])
        mask = np.ones(last, bool)
        if completion.mask is not None:
            mask[len(before) :] = completion.mask
        selections = [mask[first:]]
        for span in completion.spans:
            within = np.zeros(last, bool)
            within[len(before) + span.start : len(before) + span.end] = True
            selections.append((within & mask)[first:])
        np.testing.assert_array_equal(found.selections, selections)
        whole = reference.activations(before + own, TAPS) if before + own else {}
        for tap in TAPS:
            plain = whole[Tap(*parsed(tap))][first:last] if whole else np.zeros((0, HIDDEN_SIZE), np.float32)
            assert found.tokens[tap].dtype == found.pooled[tap].dtype == np.float32
            np.testing.assert_allclose(found.tokens[tap], plain, rtol=0, atol=1e-4 * scale[tap])
            pooled = np.array([expected_pools(plain, selection) for selection in selections])
            np.testing.assert_allclose(found.pooled[tap], pooled, rtol=0, atol=1e-4 * scale[tap])
        for answer, follow_up in zip(found.follow_ups, completion.follow_ups, strict=True):
            check(answer, follow_up, before + own, is_follow_up=True)

    if scope is Scope.PROMPT:  # masks and spans are about the completion, and refused
        asked = [RolloutGroup(group.prompt, [without_selection(each) for each in group.completions]) for group in asked]
    found = iter(engine.activations(asked, TAPS, pool=POOLS, scope=scope, max_batch_bytes=rows * ROW_BYTES))
    for group_index, group in enumerate(asked):
        for completion_index, completion in enumerate(group.completions):
            answer = next(found)
            assert (answer.group_index, answer.completion_index) == (group_index, completion_index)
            check(answer, completion, list(group.prompt), is_follow_up=False)  # type: ignore[arg-type]
    assert next(found, None) is None


def parsed(tap: str) -> tuple[str, int | None]:
    hook, _, layer = tap.partition(".")
    return hook, int(layer) if layer else None


def without_selection(completion: Completion) -> Completion:
    return Completion(completion.tokens, follow_ups=completion.follow_ups, id=completion.id)


def test_all_hooks_of_all_layers_come_in_one_pass(engine: Engine, reference: ReferenceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = count_batches(monkeypatch)
    (found,) = engine.activations([RolloutGroup([BOS, 7], [[8, 9, 10]])], "*")
    names = [f"{hook}.{layer}" for hook in ("resid_pre", "resid_post", "attn_out", "mlp_out") for layer in range(LAYERS)]
    assert list(found.tokens) == [*names, "final_norm"]
    assert len(forwards) == 1
    plain = reference.activations([BOS, 7, 8, 9, 10], list(found.tokens))
    for tap, rows in found.tokens.items():
        np.testing.assert_allclose(rows, plain[Tap(*parsed(tap))][2:], atol=1e-4)


def count_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of activations of each forward from now on."""
    sizes: list[int] = []
    make = Activations.empty

    def empty(*args: object) -> Activations:
        made = make(*args)  # type: ignore[arg-type]
        sizes.append(sum(rows.nbytes for rows in made.rows.values()))
        return made

    monkeypatch.setattr(Activations, "empty", empty)
    return sizes


# ------------------------------------------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("resid_post.2", ["resid_post.2"]),
        (Tap("resid_post", 2), ["resid_post.2"]),
        (
            ["*.1", "resid_post.*"],
            ["resid_pre.1", "resid_post.1", "attn_out.1", "mlp_out.1", "resid_post.0", "resid_post.2", "resid_post.3"],
        ),
        (["final_norm", Tap("final_norm")], ["final_norm"]),
        ("resid_p*.[12]", ["resid_pre.1", "resid_pre.2", "resid_post.1", "resid_post.2"]),
    ],
)
def test_taps_are_named_or_matched(engine: Engine, patterns: str | list[str], names: list[str]) -> None:
    (found,) = engine.activations([RolloutGroup([BOS], [[5]])], patterns)
    assert list(found.tokens) == names


def test_an_engine_without_probes_loads_no_block_beyond_the_deepest_tap_and_reads_no_other(reference: ReferenceModel) -> None:
    engine = Engine.load(str(tiny_model()), taps=["resid_post.1", Tap("resid_pre", 2)])
    assert engine.info.model.num_loaded_layers == 2
    (found,) = engine.activations([RolloutGroup([BOS], [[5, 6]])], "*")
    assert list(found.tokens) == ["resid_pre.2", "resid_post.1"]
    with pytest.raises(InvalidRequest, match=r"^taps\[1\]: 'resid_post.3' is none of the taps that this engine was loaded for"):
        engine.activations([RolloutGroup([BOS], [[5, 6]])], ["resid_post.1", "resid_post.3"])


def test_taps_of_probes_can_be_read_too(reference: ReferenceModel, tmp_path: Path) -> None:
    engine = Engine.load(str(tiny_model()), [linear(tap="resid_post.0").write(tmp_path, reference)], taps="mlp_out.1")
    (found,) = engine.activations([RolloutGroup([BOS], [[5, 6]])], "*")
    assert list(found.tokens) == ["resid_post.0", "mlp_out.1"]
    assert np.isfinite(engine.score([RolloutGroup([BOS], [[5, 6]])]).values("linear")).all()


@pytest.mark.parametrize("tap", ["resid_post.4", "resid_mid.1", "", "final_norm.0"])
def test_a_tap_that_the_model_does_not_have_is_refused_before_it_is_loaded(tap: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^taps\[0\]: .* is none of the taps of this model: resid_pre.0 … resid_pre.3, .*final_norm$"):
        Engine.load(str(tiny_model()), taps=[tap])


def test_an_engine_without_taps_says_how_to_get_some() -> None:
    with pytest.raises(InvalidRequest, match=r"Engine.load\(…, taps=\[…\]\)\): none"):
        Engine.load(str(tiny_model())).activations([RolloutGroup([BOS], [[5]])], "*")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pool": "median"}, "^pool: 'median' is none of tokens, mean, last, max$"),
        ({"pool": ()}, "^pool: at least one of"),
        ({"taps": ()}, "^taps: at least one is needed"),
        ({"scope": "answer"}, "^scope: 'answer' is none of"),
        ({"groups": []}, "^groups: at least one"),
        ({"groups": [RolloutGroup([BOS], [Completion([5], mask=[1, 0])])]}, r"^groups\[0\].completions\[0\].mask"),
        ({"groups": [RolloutGroup([BOS], [[VOCAB_SIZE]])]}, r"^groups\[0\].completions\[0\].ids"),
    ],
)
def test_what_is_wrong_is_named_at_the_call_before_anything_is_computed(engine: Engine, fields: dict[str, object], message: str) -> None:
    asked = {"groups": [RolloutGroup([BOS], [[5]])], "taps": "*"} | fields
    with pytest.raises(InvalidRequest, match=message):
        engine.activations(**asked)  # type: ignore[arg-type]


def test_texts_and_chats_are_tokenised_and_flagged(engine: Engine) -> None:
    asked = [
        RolloutGroup(Text("w5 w6", add_special_tokens=True), ["w7 w8"]),
        RolloutGroup([BOS, 5, 6], [[7, 8]]),
        RolloutGroup(Chat.of([{"role": "user", "content": "w5"}]), ["w7"]),
    ]
    text, same, chat = engine.activations(asked, "resid_post.3")
    assert (text.inexact_ids, same.inexact_ids, chat.inexact_ids) == (True, False, True)
    np.testing.assert_allclose(text.tokens["resid_post.3"], same.tokens["resid_post.3"], atol=1e-5)


# ------------------------------------------------------------------------------------------------------------------------- bounds


def test_batches_hold_no_more_bytes_than_allowed_and_give_the_same(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    asked = [RolloutGroup([BOS, *random.integers(4, 90, 30)], [random.integers(4, 90, 20) for _ in range(6)]) for _ in range(3)]
    whole = [*engine.activations(asked, TAPS, pool=POOLS)]
    for allowed in (60 * 3 * ROW_BYTES, 61 * ROW_BYTES * 3, 200 * ROW_BYTES * 3):
        sizes = count_batches(monkeypatch)
        split = [*engine.activations(asked, TAPS, pool=POOLS, max_batch_bytes=allowed)]
        assert len(sizes) > 1
        assert max(sizes) <= allowed
        for a, b in zip(whole, split, strict=True):
            for tap in TAPS:
                np.testing.assert_allclose(a.tokens[tap], b.tokens[tap], atol=1e-4)
                np.testing.assert_allclose(a.pooled[tap], b.pooled[tap], atol=1e-4)


def test_a_long_rollout_is_pooled_some_taps_at_a_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    asked = [RolloutGroup([BOS, 5], [random.integers(4, 90, 100), Completion([7], follow_ups=(Completion([8, 9]),))])]
    whole = [*engine.activations(asked, "*", pool="mean")]
    sizes = count_batches(monkeypatch)
    allowed = 250 * ROW_BYTES  # of 17 taps × 100 tokens
    split = [*engine.activations(asked, "*", pool="mean", max_batch_bytes=allowed)]
    assert max(sizes) <= allowed
    for a, b in zip(whole, split, strict=True):
        assert list(a.pooled) == list(b.pooled)
        for tap, rows in a.pooled.items():
            np.testing.assert_allclose(b.pooled[tap], rows, atol=1e-4)
        assert [*b.follow_ups] == [] or list(b.follow_ups[0].pooled) == list(a.pooled)


@pytest.mark.parametrize(("pool", "least"), [("tokens", 100 * 17), ("mean", 100)])
def test_a_rollout_that_does_not_fit_is_refused_at_the_call(engine: Engine, pool: str, least: int) -> None:
    asked = [RolloutGroup([BOS], [[5], list(range(4, 84)) + [9] * 20])]
    assert len([*engine.activations(asked, "*", pool=pool, max_batch_bytes=least * ROW_BYTES)]) == 2
    with pytest.raises(LimitExceeded, match=r"^groups\[0\].completions\[1\]: \d+ bytes of activations; the limit max_batch_bytes is"):
        engine.activations(asked, "*", pool=pool, max_batch_bytes=least * ROW_BYTES - 1)


def test_results_hold_nothing_but_themselves(engine: Engine) -> None:
    for found in engine.activations([RolloutGroup([BOS, 5], [[6, 7], [8, 9, 10]])], TAPS, pool=POOLS):
        for array in (*found.tokens.values(), *found.pooled.values()):
            assert array.base is None
            assert array.flags.writeable


def test_the_same_call_gives_the_same_bits_whatever_came_before(engine: Engine) -> None:
    random = np.random.default_rng(2)
    prompt = random.integers(4, 90, 40)
    asked = [RolloutGroup(prompt, [random.integers(4, 90, 9), random.integers(4, 90, 30)])]
    first = [*engine.activations(asked, "*", pool=POOLS)]
    list(engine.activations([RolloutGroup(prompt[:17], [[5]]), RolloutGroup([*prompt, 5], [[6]])], "*"))
    for a, b in zip(first, engine.activations(asked, "*", pool=POOLS), strict=True):
        for tap in a.tokens:
            np.testing.assert_array_equal(a.tokens[tap], b.tokens[tap])
            np.testing.assert_array_equal(a.pooled[tap], b.pooled[tap])


# ------------------------------------------------------------------------------------------------------- cancellation and faults


def test_nothing_is_computed_before_it_is_asked_for_nor_after_it_is_not(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = count_batches(monkeypatch)
    asked = [RolloutGroup([BOS, group], [[6, 7, 8]]) for group in range(4, 14)]
    results = engine.activations(asked, "resid_post.1", max_batch_bytes=3 * ROW_BYTES)
    assert sizes == []
    next(results)
    assert len(sizes) == 1
    assert isinstance(results, Iterator)
    results.close()  # type: ignore[attr-defined]
    assert len(sizes) == 1
    assert len([*engine.activations(asked, "resid_post.1")]) == 10


def test_a_cancelled_completion_is_left_out_and_the_others_are_whole(engine: Engine) -> None:
    asked = [RolloutGroup([BOS, 5], [[6, 7], [8, 9], [10]]), RolloutGroup([BOS, 6], [[6, 7], [8, 9]])]
    whole = [*engine.activations(asked, TAPS)]
    for allowed in (1 << 30, 3 * ROW_BYTES * 3):
        found = [*engine.activations(asked, TAPS, is_cancelled=lambda index: index in (1, 3), max_batch_bytes=allowed)]
        assert [(each.group_index, each.completion_index) for each in found] == [(0, 0), (0, 2), (1, 1)]
        for each, same in zip(found, (whole[0], whole[2], whole[4]), strict=True):
            for tap in TAPS:
                np.testing.assert_allclose(each.tokens[tap], same.tokens[tap], atol=1e-4)


def test_a_cancelled_completion_is_not_computed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = []
    original = engine._backbone._decoder.model.forward  # type: ignore[attr-defined]

    def forward(*args: object, **keywords: torch.Tensor) -> object:
        tokens.append(keywords["input_ids"].numel())
        return original(*args, **keywords)

    monkeypatch.setattr(engine._backbone._decoder.model, "forward", forward)  # type: ignore[attr-defined]
    long = list(range(4, 84))
    assert [*engine.activations([RolloutGroup([BOS], [long, [5]])], TAPS, is_cancelled=lambda index: index == 0)] != []
    assert sum(tokens) < len(long)


def test_nan_in_the_model_fails_one_completion_and_names_the_tap(tmp_path: Path) -> None:
    shutil.copytree(tiny_model(), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"][BROKEN] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    engine = Engine.load(str(tmp_path / "model"), taps=TAPS)
    asked = [RolloutGroup([BOS, 5], [[6], [7, BROKEN], Completion([8], follow_ups=(Completion([BROKEN]), Completion([9])))])]
    for allowed in (1 << 30, 9 * ROW_BYTES):
        fine, broken, forked = engine.activations(asked, TAPS, pool=POOLS, max_batch_bytes=allowed)
        assert [each.status for each in (fine, broken, forked, *forked.follow_ups)] == [
            CompletionStatus.OK,
            CompletionStatus.NON_FINITE,
            CompletionStatus.OK,
            CompletionStatus.NON_FINITE,
            CompletionStatus.OK,
        ]
        assert broken.status_message == "the model gives NaN or an infinity at resid_post.1"
        assert dict(broken.tokens) == dict(broken.pooled) == {}
        assert all(np.isfinite(rows).all() for rows in (*fine.tokens.values(), *forked.pooled.values()))


def test_an_engine_that_sleeps_says_so(reference: ReferenceModel) -> None:
    engine = Engine.load(str(tiny_model()), taps="resid_post.1")
    engine.sleep()
    with pytest.raises(RuntimeError, match="the engine sleeps: call wake first"):
        next(engine.activations([RolloutGroup([BOS], [[5]])], "*"))
    engine.wake()
    assert next(engine.activations([RolloutGroup([BOS], [[5]])], "*")).tokens["resid_post.1"].shape == (1, HIDDEN_SIZE)
