"""What a new hook must be added to by hand: the page that says what it means, and what is held to plain Hugging Face."""

import re
from pathlib import Path

import pytest
from parity_cases import EVERY_HOOK

from probescore import Hook, Tap
from probescore_server.probes.format.manifest import TapInput

SCORES = (Path(__file__).parents[2] / "docs/explanation/scores.md").read_text()


@pytest.mark.parametrize("hook", Hook, ids=str)
def test_a_hook_is_described_and_compared_with_plain_hugging_face(hook):
    rows = [line.split("|")[1] for line in SCORES.splitlines() if line.startswith("| `")]
    assert str(hook) in re.findall(r"`(\w+)`", "".join(rows))
    assert str(hook) in {tap.partition(".")[0] for tap in EVERY_HOOK}


@pytest.mark.parametrize("hook", Hook, ids=str)
def test_a_tap_is_the_same_with_a_hook_and_with_its_name(hook):
    layer = 3 if hook.has_layer else None
    assert Tap(hook, layer) == Tap(hook.value, layer)
    assert hash(Tap(hook, layer)) == hash(Tap(hook.value, layer))
    assert str(Tap(hook, layer)) == str(Tap(hook.value, layer)) == (f"{hook.value}.3" if hook.has_layer else hook.value)
    assert TapInput.parse(Tap(hook, layer)).tap == Tap(hook, layer)
