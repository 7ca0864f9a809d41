"""Groups never stand on two sides."""

from __future__ import annotations

import numpy as np
import pytest

from probescore_probes.fitting.labelled_rollouts import Example
from probescore_probes.fitting.splits import folds, groups_of, shared_texts, split


def example(prompt, completion, positive, *, group=None, split=None, slice=""):
    ids = [np.array(each, np.int32) for each in (prompt, completion)]
    return Example(*ids, None, None, positive, "line", group, split, slice, 1.0, "ids")


def examples(count, completions_of_prompt=2, groups=False):
    return [
        example(
            [5, index // completions_of_prompt], [7, index], index % 2 == 0, group=str(index // completions_of_prompt) if groups else None
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("groups", [True, False])
def test_a_split_keeps_groups_whole_and_takes_every_example_once(seed, groups):
    data = examples(100, groups=groups)
    parts = split(data, seed)
    assert parts.named is groups
    assert sorted(np.concatenate(list(parts.parts.values()))) == list(range(100))
    sides = [set(parts.groups[indices]) for indices in parts.parts.values()]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 50
    assert [len(parts[name]) for name in ("train", "calibration", "test")] == [60, 20, 20]
    assert shared_texts(data, parts.parts) == (0, 0)


def test_equal_prompts_and_equal_completions_tie_rollouts_together():
    data = [
        example([1], [10], True),
        example([1], [11], False),
        example([2], [11], True),
        example([3], [12], False),
        example([], [13], True),
    ]
    data += [example([], [14], False)]
    groups, named = groups_of(data)
    assert not named
    assert len({*groups[:3].tolist()}) == 1
    assert len({*groups.tolist()}) == 4


def test_equal_completions_of_different_slices_are_not_tied():
    groups, _ = groups_of([example([1], [9], True, slice="a"), example([2], [9], False, slice="b")])
    assert groups[0] != groups[1]


def test_what_is_all_tied_together_asks_for_groups():
    with pytest.raises(ValueError, match=r'group: 30 of 30 examples are tied together .*"group"'):
        split([example([index // 2], [index % 2], index % 2 == 0) for index in range(30)], 0)


def test_a_given_split_is_kept_and_a_group_on_two_sides_is_refused():
    names = ["train"] * 6 + ["calibration"] * 2 + ["test"] * 2
    data = [example([index], [index], index % 2 == 0, group=str(index), split=name) for index, name in enumerate(names)]
    assert [len(split(data, 0)[name]) for name in ("train", "calibration", "test", "ood")] == [6, 2, 2, 0]
    data[-1] = example([9], [9], False, group="0", split="test")
    with pytest.raises(ValueError, match="group '0' is in test, and in train"):
        split(data, 0)


def test_some_lines_without_a_group_or_a_split_are_refused():
    with pytest.raises(ValueError, match="no group, where other lines have one"):
        groups_of([example([1], [1], True, group="a"), example([2], [2], True)])
    with pytest.raises(ValueError, match="no split, where other lines have one"):
        split([example([1], [1], True, split="train"), example([2], [2], False)], 0)


def test_a_side_without_a_class_is_refused():
    with pytest.raises(ValueError, match=r"label: all 20 examples are negative; a probe is fitted on both kinds"):
        split([example([index], [index], False) for index in range(20)], 0)
    given = [example([index], [index], index > 12, split=("train", "calibration", "test")[index % 3]) for index in range(15)]
    with pytest.raises(ValueError, match=r"split: no positive example among 6 for train; give every split both kinds"):
        split([each for each in given if each.split != "train" or not each.positive] + given[:1], 0)
    drawn = [example([index], [index], index == 3) for index in range(20)]
    with pytest.raises(ValueError, match=r"split: no positive example among \d+ for \w+; give more groups that have one"):
        split(drawn, 0)
    with pytest.raises(ValueError, match=r"group: 2 among 20 examples, and each of train, calibration, test takes at least one"):
        split([example([index], [index], index % 3 == 0, group=str(index % 2)) for index in range(20)], 0)


def test_folds_hold_every_example_out_once_with_whole_groups_and_both_classes():
    groups = np.repeat(np.arange(20), 3)
    positive = groups % 2 == 0
    seen = []
    for fitted, held_out in folds(groups, positive, 5, 0):
        assert not set(groups[fitted]) & set(groups[held_out])
        assert positive[held_out].any()
        assert not positive[held_out].all()
        seen += held_out.tolist()
    assert sorted(seen) == list(range(60))


def test_other_data_have_groups_of_their_own_or_none():
    # a control of one prompt, from another file, whose numbers of groups are of something else
    inside = [example([prompt], [prompt + 50], bool(prompt % 2), group=str(prompt)) for prompt in range(20)]
    outside = [example([7], [prompt], bool(prompt % 2), split="ood", group="3" if prompt > 5 else None) for prompt in range(10)]
    found = split([*inside, *outside], 0)
    assert found.named
    assert not {*found.groups[:20].tolist()} & {*found.groups[20:].tolist()}
    assert len({*found.groups[20:].tolist()}) == 2
    with pytest.raises(ValueError, match="all are ood; give some"):
        split(outside, 0)
