"""Which rollouts are unlike those that a threshold was found on, compared with a plain reading of the rule for each rollout alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BOS, VOCAB_SIZE, tiny_tokenizer

from probescore import CalibratedRollouts, Calibration, ModelInfo, OutputPer, ProbeInfo, PromptShape, Reduction, Scope, ScoreUnit
from probescore.types import UnmetCondition
from probescore_server.backbone.tokenizer import TextEncoder
from probescore_server.rollouts import CheckedRollout, Continuation, EngineInfo, ResolvedOptions
from probescore_server.validation.calibrated_rollouts import OutsideRollouts, calibrations_with_conditions, prompt_shape

MEAN, MAX = Reduction.parse("mean"), Reduction.parse("max")
ENDING = (8, 9)
SHAPES = tuple(shape.value for shape in PromptShape)


def conditions(**changes: object) -> CalibratedRollouts:
    return replace(CalibratedRollouts(2, "float32", 1, 4, 2, 5, ("ids",), SHAPES, ENDING), **changes)


def calibration(on: CalibratedRollouts | None, reduction: Reduction | None = None, label: str = "") -> Calibration:
    return Calibration(0.5, 0.05, 0.01, 0.1, 100, "a data set", reduction, label, on)


def probe(*calibrations: Calibration, name: str = "cheating", labels: tuple[str, ...] = ("cheats",)) -> ProbeInfo:
    return ProbeInfo(name, "1", "", "g", "m", (), ScoreUnit.LOGIT, OutputPer.TOKEN, labels, MEAN, calibrations, (), "{}")


def engine_info(*probes: ProbeInfo) -> EngineInfo:
    return EngineInfo(ModelInfo("model", "", "fingerprint", "llama", 8, 2, 2, 96, 0), "", BOS, probes, "cpu", "float32", "universal")


def options(info: EngineInfo, scope: Scope = Scope.COMPLETION, reductions: tuple[Reduction, ...] = ()) -> ResolvedOptions:
    return ResolvedOptions(tuple(each.key for each in info.probes), reductions, scope=scope)


ids = st.lists(st.sampled_from([BOS, 7, *ENDING]), max_size=6)
groups = st.lists(st.tuples(ids, st.lists(st.tuples(ids, st.booleans()), min_size=1, max_size=3)), min_size=1, max_size=4)
ranges = st.tuples(st.integers(0, 6), st.integers(0, 6)).map(sorted)
recorded = st.builds(
    lambda prompt, completion, shapes: CalibratedRollouts(2, "float32", *prompt, *completion, ("ids",), tuple(shapes), ENDING),
    ranges,
    ranges,
    st.lists(st.sampled_from(SHAPES), unique=True),
)


def shape_of(prompt: list[int], completion: list[int]) -> str:
    first = (prompt or completion)[:1]
    kind = "empty" if not prompt else "template" if prompt[-2:] == list(ENDING) else "text"
    return f"bos {kind}" if first == [BOS] else kind


@settings(max_examples=200)
@given(groups, recorded, recorded, st.sampled_from(Scope))
def test_each_rollout_is_compared_by_itself(asked, one, other, scope) -> None:
    rollouts, expected = [], []
    for prompt, completions in asked:
        prompt_ids, group = np.array(prompt, np.int32), []
        for completion, masked in completions:
            mask = np.arange(len(completion)) % 2 == 0 if masked else None
            counted = len(completion) if mask is None else int(mask.sum())
            group.append(CheckedRollout(prompt_ids, Continuation(np.array(completion, np.int32), mask), ResolvedOptions(())))
            selects = {Scope.COMPLETION: counted, Scope.PROMPT: len(prompt), Scope.ALL: len(prompt) + counted}[scope] > 0
            unmet = set()
            for on, reduction in ((one, MEAN), (other, MAX)):
                if scope is not Scope.COMPLETION:
                    found = {"scope"}
                else:
                    found = {
                        name
                        for name, outside in {
                            "completion_length": not on.shortest_completion <= counted <= on.longest_completion,
                            "prompt_length": not on.shortest_prompt <= len(prompt) <= on.longest_prompt,
                            "prompt_shape": bool(on.prompt_shapes) and shape_of(prompt, completion) not in on.prompt_shapes,
                        }.items()
                        if outside
                    }
                unmet |= {UnmetCondition(name, reduction) for name in found}
            expected.append(unmet if selects else set())
        rollouts.append(group)
    info = engine_info(probe(calibration(one, MEAN), calibration(other, MAX)))
    chosen = options(info, scope, (MEAN, MAX))
    outside = OutsideRollouts.of(rollouts, calibrations_with_conditions(info, chosen), scope, BOS)

    # as a response to all, and as a stream in any order of which every third has no scores
    places = np.arange(len(expected))
    some = np.where(places % 3 == 2, -1, places)[::-1]
    for order in (places, some):
        (noted,) = outside.noted(info.scored_probes(chosen), order)
        found = [{each.unmet for each in noted.outside_calibration if index in each.completions} for index in range(len(order))]
        assert found == [expected[place] if place >= 0 else set() for place in order]
    flat = [(group, index) for group, own in enumerate(rollouts) for index in range(len(own))]
    assert outside.places(flat).tolist() == places.tolist()


def test_what_nobody_wrote_down_flags_nothing() -> None:
    rollouts = [[CheckedRollout(np.zeros(0, np.int32), Continuation(np.full(300, 7, np.int32)), ResolvedOptions(()))]]
    info = engine_info(probe(calibration(None)), probe(name="other"))
    assert OutsideRollouts.of(rollouts, calibrations_with_conditions(info, options(info)), Scope.COMPLETION, BOS) is None
    # files from before the shapes were written down
    info = engine_info(probe(calibration(conditions(shortest_prompt=0, longest_completion=300, prompt_shapes=()))))
    outside = OutsideRollouts.of(rollouts, calibrations_with_conditions(info, options(info)), Scope.COMPLETION, BOS)
    assert outside.unmet == ({},)


def test_only_the_calibrations_of_the_reductions_that_are_sent_count_and_the_first_of_each() -> None:
    narrow = conditions(longest_completion=2)
    info = engine_info(
        probe(calibration(conditions()), calibration(narrow, MEAN), calibration(narrow, MAX)),
        probe(calibration(narrow, label="angry"), name="mood", labels=("calm", "angry")),
    )
    of_mean, of_max = (calibrations_with_conditions(info, options(info, reductions=chosen)) for chosen in ((), (MAX,)))
    assert [[(each.reduction, each.label, each.conditions) for each in own] for own in of_mean] == [
        [(None, "", conditions())],
        [(None, "angry", narrow)],
    ]
    assert [[each.reduction for each in own] for own in of_max] == [[MAX], []]


@pytest.mark.parametrize(
    ("template", "ending"),
    [
        (
            "{{ bos_token }}{% for m in messages %} {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} w5 assistant{% endif %}",
            (5, VOCAB_SIZE - 1),
        ),
        ("{% for m in messages %}user {{ m['content'] }} w7 {% endfor %}", (7,)),
        ("{% for m in messages %}user {{ m['content'] }}{% endfor %}", ()),
        ("{{ raise_exception('a system message first') }}", ()),
        (None, ()),
    ],
)
def test_the_ids_with_which_a_template_ends_are_found(template: str | None, ending: tuple[int, ...]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert TextEncoder(tokenizer).generation_prompt_ids() == ending


def test_a_model_without_a_tokenizer_has_no_template() -> None:
    assert TextEncoder(None).generation_prompt_ids() == ()
    shape = prompt_shape(np.array([BOS, 7]), np.array([8]), bos_token_id=None, generation_prompt_ids=())
    assert shape is PromptShape.TEXT
