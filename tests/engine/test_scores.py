"""What a score means, through the engine, against plain Hugging Face one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from engine_probes import POSITION_STEP, Array, linear, plain, pooled_mean, positioned, running_mean
from models import BOS, EOS, tiny_model

from probescore import Reduction, ScoreOptions, reduce_scores
from probescore._answers import AnswerCheck
from probescore._client import score_request
from probescore.types import Chat, Completion, CompletionScores, RolloutGroup, Scope, ScoreUnit, Span, Text
from probescore_probes.reference import ReferenceModel
from probescore_server import Engine
from probescore_server.probes.format.manifest import FollowUp

Load = Callable[..., Engine]
PROMPT, ANSWER = [BOS, 40, 41, 42], [50, 51, 52, 53, EOS]
TOLERANCE = 2e-5
REDUCTIONS = [
    "mean", "max", "min", "sum", "last", "topk_mean(2)", "ema_max(0.3)", "window_max_mean(2)", "softmax_mean(0.5)", "fraction_above(0.1)",
]  # fmt: skip


@pytest.fixture(scope="module")
def engine(reference: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    directory = tmp_path_factory.mktemp("probes")
    probes = [
        linear(),
        running_mean(),
        running_mean("running-mean-sees", sees_prompt=True),
        pooled_mean(),
        pooled_mean("pooled-sees", sees_prompt=True),
        positioned(),
    ]
    return Engine.load(str(tiny_model()), [probe.write(directory, reference) for probe in probes])


def only(engine: Engine, completion: Completion | list[int], prompt: Sequence[int] = PROMPT, **options: object) -> CompletionScores:
    return engine.score([RolloutGroup(list(prompt), [completion])], **options).groups[0][0]  # type: ignore[arg-type]


def tokens(scored: CompletionScores, probe: str) -> Array:
    found = scored[probe].tokens
    assert found is not None
    return found[:, 0].astype(np.float64)


def close(found: object, expected: object) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


# ------------------------------------------------------------------------------------------------------------------- which positions


def test_entry_i_reads_the_position_whose_input_is_token_i(engine: Engine, reference: ReferenceModel) -> None:
    scored = only(engine, ANSWER, token_scores="all")
    close(tokens(scored, "linear"), plain(reference, PROMPT, ANSWER)[len(PROMPT) :])


def test_last_token_is_scored_too(engine: Engine, reference: ReferenceModel) -> None:
    assert only(engine, ANSWER, reductions=["last"])["linear"].value == pytest.approx(plain(reference, PROMPT, ANSWER)[-1], abs=TOLERANCE)


def test_positions_are_those_in_the_whole_rollout(engine: Engine, reference: ReferenceModel) -> None:
    scored = only(engine, ANSWER, token_scores="all")
    expected = plain(reference, PROMPT, ANSWER) + POSITION_STEP * np.arange(len(PROMPT) + len(ANSWER))
    close(tokens(scored, "positioned"), expected[len(PROMPT) :])


def test_causal_probe_sees_the_prompt_only_if_its_manifest_says_so(engine: Engine, reference: ReferenceModel) -> None:
    scored = only(engine, ANSWER, token_scores="all")
    each = plain(reference, PROMPT, ANSWER)
    close(tokens(scored, "running-mean"), np.cumsum(each[4:]) / np.arange(1, 6))
    close(tokens(scored, "running-mean-sees"), (np.cumsum(each) / np.arange(1, 10))[4:])


def test_pooling_probe_sees_the_prompt_only_if_its_manifest_says_so(engine: Engine, reference: ReferenceModel) -> None:
    scored = only(engine, ANSWER)
    each = plain(reference, PROMPT, ANSWER)
    close(scored["pooled-mean"].value, each[4:].mean())
    close(scored["pooled-sees"].value, each.mean())


def test_scope_prompt_scores_the_prompt(engine: Engine, reference: ReferenceModel) -> None:
    scored = only(engine, ANSWER, scope="prompt", token_scores="all")
    each = plain(reference, PROMPT)
    close(tokens(scored, "linear"), each)
    close(tokens(scored, "running-mean"), np.cumsum(each) / np.arange(1, 5))
    for probe in ("pooled-mean", "pooled-sees"):
        close(scored[probe].value, each.mean())


def test_scope_all_scores_prompt_then_completion(engine: Engine, reference: ReferenceModel) -> None:
    scored = only(engine, Completion(ANSWER, mask=[1, 1, 0, 0, 0], spans=(Span("second", 1, 3),)), scope=Scope.ALL, token_scores="all")
    each = plain(reference, PROMPT, ANSWER)
    close(tokens(scored, "linear"), each)
    close(scored["linear"].reduced[:, 0, 0], [each[:6].mean(), each[5]])
    close(scored["pooled-mean"].reduced[:, 0, 0], [each[:6].mean(), each[5]])
    close(scored["pooled-sees"].at(0), each[:6].mean())


def test_completion_scores_do_not_depend_on_the_scope(engine: Engine) -> None:
    alone, within = only(engine, ANSWER, token_scores="all"), only(engine, ANSWER, scope="all", token_scores="all")
    for probe in ("linear", "running-mean", "running-mean-sees", "positioned"):
        close(tokens(within, probe)[len(PROMPT) :], tokens(alone, probe))


# --------------------------------------------------------------------------------------------------------- what counts in reductions


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_reduction_is_over_the_selected_tokens_in_order(engine: Engine, reference: ReferenceModel, reduction: str) -> None:
    mask = np.array([0, 1, 1, 0, 1], np.bool_)
    scored = only(engine, Completion(ANSWER, mask=mask), reductions=[reduction])
    selected = plain(reference, PROMPT, ANSWER)[4:][mask, None].astype(np.float32)
    close(scored["linear"].reduced[0, 0], reduce_scores(selected, Reduction.parse(reduction)))


def test_reductions_answer_in_the_order_asked(engine: Engine) -> None:
    result = engine.score([RolloutGroup(PROMPT, [ANSWER])], probes=["linear"], reductions=["max", "min", "max"])
    assert [str(reduction) for reduction in result.info.probes[0].reductions] == ["max", "min", "max"]
    highest, lowest, again = result.groups[0][0]["linear"].reduced[0, :, 0]
    assert highest == again > lowest


def test_masked_tokens_are_left_out_of_reductions_and_still_have_scores(engine: Engine, reference: ReferenceModel) -> None:
    scored = only(engine, Completion(ANSWER, mask=[1, 0, 0, 0, 1]), token_scores="all")
    each = plain(reference, PROMPT, ANSWER)[4:]
    close(tokens(scored, "linear"), each)
    # in a stack, and as a graph of its own
    close(scored["linear"].value, each[[0, 4]].mean())
    close(scored["running-mean"].value, tokens(scored, "running-mean")[[0, 4]].mean())


def test_mask_does_not_change_what_a_causal_probe_reads(engine: Engine) -> None:
    masked = only(engine, Completion(ANSWER, mask=[0, 0, 0, 0, 1]), token_scores="all", reductions=["last"])
    unmasked = only(engine, ANSWER, token_scores="all", reductions=["last"])
    close(tokens(masked, "running-mean"), tokens(unmasked, "running-mean"))
    assert masked["running-mean"].value == unmasked["running-mean"].value


def test_mask_leaves_rows_out_of_what_a_pooling_probe_is_given_but_not_the_prompt(engine: Engine, reference: ReferenceModel) -> None:
    scored = only(engine, Completion(ANSWER, mask=[0, 1, 0, 0, 1]))
    each = plain(reference, PROMPT, ANSWER)
    close(scored["pooled-mean"].value, each[[5, 8]].mean())
    close(scored["pooled-sees"].value, each[[0, 1, 2, 3, 5, 8]].mean())


def test_overlapping_spans_are_reduced_apart_under_the_mask(engine: Engine, reference: ReferenceModel) -> None:
    spans = (Span("start", 0, 3), Span("middle", 1, 4), Span("nothing", 2, 2), Span("masked", 2, 3))
    scored = only(engine, Completion(ANSWER, mask=[1, 1, 0, 1, 1], spans=spans))
    each = plain(reference, PROMPT, ANSWER)[4:]
    expected = [each[[0, 1, 3, 4]].mean(), each[[0, 1]].mean(), each[[1, 3]].mean(), np.nan, np.nan]
    close(scored["linear"].reduced[:, 0, 0], expected)
    close(scored["pooled-mean"].reduced[:, 0, 0], expected)


def test_mask_of_zeros_is_absent_and_never_zero(engine: Engine) -> None:
    scored = only(engine, Completion(ANSWER, mask=[0] * 5), reductions=REDUCTIONS)
    for probe in scored.scores.values():
        assert np.isnan(probe.reduced).all()
        assert probe.value is None


def test_special_tokens_are_left_out_where_the_manifest_says_so(load: Load, reference: ReferenceModel) -> None:
    engine = load(
        linear("words", exclude_special_tokens=True),
        pooled_mean("pooled-words", exclude_special_tokens=True, sees_prompt=True),
        linear("all"),
    )
    named = engine.score([RolloutGroup([1], [[5]])]).info.probes
    assert {probe.name for probe in named if probe.exclude_special_tokens} == {"words", "pooled-words"}
    each = plain(reference, PROMPT, ANSWER)
    scored = only(engine, ANSWER, token_scores=["words"])
    close(tokens(scored, "words"), each[4:])
    close(scored["words"].value, each[4:8].mean())
    close(scored["pooled-words"].value, each[:8].mean())  # BOS is in the prompt, which is seen whole
    close(scored["all"].value, each[4:].mean())
    within = only(engine, ANSWER, scope="all")
    close(within["words"].value, each[1:8].mean())
    close(within["pooled-words"].value, each[1:8].mean())


def test_sigmoid_comes_before_the_reduction_where_the_manifest_says_probability(load: Load, reference: ReferenceModel) -> None:
    engine = load(
        linear("p", reduce_on=ScoreUnit.PROBABILITY),
        pooled_mean("pooled-p", unit=ScoreUnit.LOGIT, reduce_on=ScoreUnit.PROBABILITY),
    )
    scored = only(engine, ANSWER, token_scores=["p"])
    logits = plain(reference, PROMPT, ANSWER)[4:]
    probabilities = 1 / (1 + np.exp(-logits))
    close(tokens(scored, "p"), probabilities)
    close(scored["p"].value, probabilities.mean())
    close(scored["pooled-p"].value, 1 / (1 + np.exp(-logits.mean())))
    assert {probe.unit for probe in engine.info.probes} == {ScoreUnit.PROBABILITY}


# --------------------------------------------------------------------------------------------------------------------- follow-ups


def test_nested_follow_ups_continue_what_they_follow(engine: Engine, reference: ReferenceModel) -> None:
    inner = Completion([80, 81], id="inner")
    outer = Completion([70, 71, 72], follow_ups=(inner,), id="outer", mask=[0, 1, 1], spans=(Span("first", 0, 1),))
    scored = only(engine, Completion(ANSWER, follow_ups=(outer, Completion([90]))), token_scores="all")
    followed, single = scored.follow_ups
    each = plain(reference, PROMPT, ANSWER, [70, 71, 72], [80, 81])
    close(tokens(scored, "linear"), each[4:9])
    close(tokens(followed, "linear"), each[9:12])
    close(followed["linear"].reduced[:, 0, 0], [each[10:12].mean(), np.nan])
    close(tokens(followed.follow_ups[0], "linear"), each[12:])
    close(tokens(single, "linear"), plain(reference, PROMPT, ANSWER, [90])[9:])
    close(tokens(followed.follow_ups[0], "running-mean-sees"), (np.cumsum(each) / np.arange(1, 15))[12:])
    close(tokens(followed.follow_ups[0], "running-mean"), np.cumsum(each[12:]) / [1, 2])
    close(followed.follow_ups[0]["pooled-sees"].value, each.mean())
    assert (followed.id, followed.follow_ups[0].id) == ("outer", "inner")


@pytest.mark.parametrize("scope", ["prompt", "all"])
def test_follow_ups_score_their_own_tokens_whatever_the_scope(engine: Engine, reference: ReferenceModel, scope: str) -> None:
    scored = only(engine, Completion(ANSWER, follow_ups=(Completion([70, 71]),)), scope=scope, token_scores="all")
    close(tokens(scored.follow_ups[0], "linear"), plain(reference, PROMPT, ANSWER, [70, 71])[9:])


def test_probe_with_a_follow_up_of_its_own_reads_that_instead(load: Load, reference: ReferenceModel) -> None:
    asked = [60, 61, 62]
    engine = load(
        linear("honest", follow_up=FollowUp(token_ids=asked)),
        pooled_mean("pooled-honest", follow_up=FollowUp(token_ids=asked), sees_prompt=True),
        linear("plain"),
    )
    assert engine.info.max_follow_up_tokens == {"honest@1": 3, "pooled-honest@1": 3}
    named = engine.score([RolloutGroup([1], [[5]])]).info.probes
    assert {probe.name: probe.follow_up_tokens for probe in named} == {"honest": 3, "pooled-honest": 3, "plain": 0}
    completion = Completion(ANSWER, mask=[0] * 5, spans=(Span("start", 0, 2),), follow_ups=(Completion([70]),))
    scored = only(engine, completion, token_scores=["honest", "plain"])
    each = plain(reference, PROMPT, ANSWER, asked)
    close(tokens(scored, "honest"), each[9:])
    close(scored["honest"].reduced[:, 0, 0], [each[9:].mean(), np.nan])
    close(scored["pooled-honest"].reduced[:, 0, 0], [each.mean(), np.nan])
    close(tokens(scored, "plain"), each[4:9])
    close(tokens(scored.follow_ups[0], "honest"), plain(reference, PROMPT, ANSWER, [70], asked)[10:])


# ------------------------------------------------------------------------------------------------------------- the edges of what is asked


def test_empty_completion_is_absent(engine: Engine) -> None:
    scored = only(engine, [], token_scores="all")
    for probe in scored.scores.values():
        assert probe.value is None
    assert tokens(scored, "linear").shape == (0,)


def test_follow_up_to_an_empty_completion_continues_the_prompt(engine: Engine, reference: ReferenceModel) -> None:
    scored = only(engine, Completion([], follow_ups=(Completion(ANSWER),)), token_scores="all")
    close(tokens(scored.follow_ups[0], "linear"), plain(reference, PROMPT, ANSWER)[4:])


def test_one_token_completion(engine: Engine, reference: ReferenceModel) -> None:
    scored = only(engine, [50], reductions=REDUCTIONS[:5])
    close(scored["linear"].reduced[0, :, 0], np.full(5, plain(reference, PROMPT, [50])[-1]))


def test_empty_prompt_reads_the_completion_from_position_0(engine: Engine, reference: ReferenceModel) -> None:
    scored = only(engine, ANSWER, prompt=[], token_scores="all")
    each = plain(reference, ANSWER)
    close(tokens(scored, "linear"), each)
    close(tokens(scored, "running-mean-sees"), np.cumsum(each) / np.arange(1, 6))
    close(tokens(scored, "positioned"), each + POSITION_STEP * np.arange(5))


def test_empty_prompt_and_completion_are_absent(engine: Engine) -> None:
    assert only(engine, [], prompt=[], scope="all")["linear"].value is None


def test_identical_completions_are_computed_once_and_scored_alike(engine: Engine) -> None:
    result = engine.score([RolloutGroup(PROMPT, [ANSWER, ANSWER, [50, 51]]), RolloutGroup(PROMPT, [ANSWER])])
    assert result.info.usage.tokens_computed == len(PROMPT) + len(ANSWER) + 2
    assert result.info.usage.tokens_shared == 3 * len(PROMPT) + 2 * len(ANSWER)
    values = result.values("linear")
    assert values[0] == values[1] == values[3] != values[2]


def test_a_thousand_completions_of_one_prompt_are_each_answered_in_order(engine: Engine, reference: ReferenceModel) -> None:
    random = np.random.default_rng(0)
    completions = [random.integers(4, 90, random.integers(1, 6)).tolist() for _ in range(1000)]
    values = engine.score([RolloutGroup(PROMPT, completions)], probes=["linear"], reductions=["last"]).values("linear")
    assert values.shape == (1000,)
    for index in random.integers(0, 1000, 20):
        close(values[index], plain(reference, PROMPT, completions[index])[-1])


def test_work_beyond_one_batch_is_split_and_answered_in_order(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [RolloutGroup([BOS, 10 + i], [[20 + i, 30 + j] for j in range(3)]) for i in range(4)]
    together = engine.score(groups)
    monkeypatch.setattr("probescore_server.engine.engine.BATCH_TOKENS", 5)
    apart = engine.score(groups)
    close(apart.values("linear"), together.values("linear"))
    total = together.info.usage.tokens_computed + together.info.usage.tokens_shared
    assert apart.info.usage.tokens_computed + apart.info.usage.tokens_shared == total == 12 * 4
    assert apart.info.usage.tokens_computed > together.info.usage.tokens_computed


def test_long_rollouts_are_scored_across_calls_of_the_graph(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [RolloutGroup(PROMPT, [ANSWER, ANSWER[::-1], ANSWER[:2]])]
    whole = engine.score(groups, token_scores="all")
    monkeypatch.setattr("probescore_server.probes.scoring.onnx_scores.MAX_ROWS_PER_CALL", 3)
    pieces = engine.score(groups, token_scores="all")
    for probe in ("linear", "running-mean", "running-mean-sees", "pooled-mean", "pooled-sees", "positioned"):
        close(pieces.values(probe), whole.values(probe))


# -------------------------------------------------------------------------------------------------------------------- the answer


def test_answer_names_probes_and_digests_in_the_order_asked(engine: Engine) -> None:
    result = engine.score([RolloutGroup(PROMPT, [Completion(ANSWER, id="mine")])], probes=["positioned", "linear@1"])
    assert [probe.name for probe in result.info.probes] == ["positioned", "linear"]
    assert all(probe.graph_sha256.startswith("sha256:") for probe in result.info.probes)
    assert result.info.model_fingerprint == engine.info.model.fingerprint
    scored = result.groups[0][0]
    assert (scored.id, list(scored.scores), scored.prompt_ids, scored.inexact_ids) == ("mine", ["positioned", "linear"], None, False)
    assert result.info.usage.compute_seconds > 0


def test_ids_come_back_if_asked_for(engine: Engine) -> None:
    scored = only(engine, Completion(ANSWER, follow_ups=(Completion([70]),)), return_token_ids=True)
    assert (scored.prompt_ids.tolist(), scored.completion_ids.tolist()) == (PROMPT, ANSWER)  # type: ignore[union-attr]
    assert (scored.follow_ups[0].prompt_ids, scored.follow_ups[0].completion_ids.tolist()) == (None, [70])  # type: ignore[union-attr]


def test_text_and_chat_are_scored_as_their_ids_and_flagged(engine: Engine) -> None:
    chat = Chat.of([{"role": "user", "content": "w40"}])
    result = engine.score(
        [RolloutGroup(Text("w40 w41", add_special_tokens=True), ["w50 w51"]), RolloutGroup(chat, [[50]])], return_token_ids=True
    )
    (text,), (from_chat,) = result.groups
    assert (text.prompt_ids.tolist(), text.completion_ids.tolist()) == ([BOS, 40, 41], [50, 51])  # type: ignore[union-attr]
    assert (text.inexact_ids, from_chat.inexact_ids) == (True, True)
    same = only(engine, [50, 51], prompt=[BOS, 40, 41])
    assert same.inexact_ids is False
    assert text["linear"].value == pytest.approx(same["linear"].value, abs=TOLERANCE)


def test_two_versions_of_a_probe_answer_under_their_own_names(reference: ReferenceModel, tmp_path: Path) -> None:
    files = [linear().write(tmp_path, reference), linear(tap="resid_post.2").write(tmp_path, reference, version="2")]
    engine = Engine.load(str(tiny_model()), files)
    scored = only(engine, ANSWER, probes=["linear@1", "linear@2"])
    close(scored["linear@1"].value, plain(reference, PROMPT, ANSWER)[4:].mean())
    close(scored["linear@2"].value, plain(reference, PROMPT, ANSWER, tap="resid_post.2")[4:].mean())


@pytest.mark.parametrize("tap", ["resid_pre.0", "resid_pre.2", "resid_post.3", "attn_out.1", "mlp_out.2", "final_norm"])
def test_every_hook_reads_what_plain_hugging_face_has_there(load: Load, reference: ReferenceModel, tap: str) -> None:
    engine = load(linear(tap=tap))
    scored = only(engine, ANSWER, token_scores="all")
    close(tokens(scored, "linear"), plain(reference, PROMPT, ANSWER, tap=tap)[4:])


# ------------------------------------------------------------------------------------------------------------ what a client checks


def test_no_answer_of_the_engine_is_refused_by_the_client(load: Load) -> None:
    engine = load(
        linear(),
        running_mean(),
        pooled_mean("pooled-sees", sees_prompt=True),
        linear("words", exclude_special_tokens=True),
        linear("honest", follow_up=FollowUp(token_ids=[60, 61])),
        pooled_mean("pooled-honest", follow_up=FollowUp(token_ids=[60, 61]), sees_prompt=True),
    )
    names = [probe.key for probe in engine.info.probes]
    random = np.random.default_rng(0)

    def completion(scope: str, depth: int = 0) -> Completion:
        ids = random.choice([BOS, EOS, 40, 41, 42], int(random.integers(0, 4)))
        bare = scope == "prompt" and depth == 0
        mask = None if bare or random.random() < 0.5 else random.integers(0, 2, len(ids))
        ends = [] if bare else [sorted(random.integers(0, len(ids) + 1, 2).tolist()) for _ in range(random.integers(0, 3))]
        follow_ups = tuple(completion(scope, depth + 1) for _ in range(random.integers(0, 2))) if depth < 2 else ()
        return Completion(ids, mask, tuple(Span(str(number), *pair) for number, pair in enumerate(ends)), follow_ups, id=str(depth))

    for _ in range(60):
        scope = str(random.choice(["completion", "prompt", "all"]))
        groups = [
            RolloutGroup(random.choice([BOS, 40, 41], random.integers(0, 3)), [completion(scope) for _ in range(random.integers(1, 3))])
            for _ in range(2)
        ]
        options: ScoreOptions = {
            "probes": random.permutation(names)[: random.integers(0, len(names) + 1)].tolist(),
            "reductions": [[], ["max"], ["mean", "last"]][random.integers(0, 3)],
            "token_scores": "all" if random.random() < 0.5 else [],
            "scope": scope,
            "return_token_ids": bool(random.integers(0, 2)),
            "return_token_texts": bool(random.integers(0, 2)),
        }
        request = score_request(groups, options)
        AnswerCheck(request).check_result(engine.score(groups, **options))  # type: ignore[arg-type]
