import pytest
from hypothesis import given
from hypothesis import strategies as st

from probescore_server.scheduling.ordered_set import OrderedSet

STEPS = st.lists(st.tuples(st.sampled_from(["add", "remove", "move_to_end"]), st.integers(0, 5)))


@given(STEPS)
def test_members_keep_the_order_in_which_they_came(steps):
    members, expected = OrderedSet[int](), []
    for step, member in steps:
        if step != "add" and member not in expected:
            with pytest.raises(KeyError):
                getattr(members, step)(member)
            continue
        getattr(members, step)(member)
        if step != "add":
            expected.remove(member)
        if step == "move_to_end" or (step == "add" and member not in expected):
            expected.append(member)
        assert list(members) == expected
        assert len(members) == len(expected)
        assert all((each in members) == (each in expected) for each in range(6))
    members.clear()
    assert not members
