"""The tutorials do what they say: every command is typed in their order, and prints what the page shows.

The step that needs TRL is in tests/trainers/trl, and the page that needs a trained model in tests/truth.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from tutorial import REPOSITORY, SECOND_TERMINAL, TUTORIALS, Clone, blocks_of, follow, looks_like

from probescore_probes import read_probe_file


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return Clone.make(tmp_path_factory.mktemp("clone"), Path(sys.prefix))


@pytest.fixture(scope="module")
def first_score(clone: Clone) -> dict[str, str]:
    return follow(TUTORIALS / "first-score.md", clone)


@pytest.fixture(scope="module")
def first_reward(first_score: dict[str, str], clone: Clone) -> dict[str, str]:
    """After the other one, whose model it takes."""
    return follow(TUTORIALS / "first-reward.md", clone, leave_out=".venv-trainers")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_score(first_score: dict[str, str], clone: Clone) -> None:
    asked = first_score["python examples/first_score/ask.py"]
    copied, sorted_ = (float(number) for number in re.findall(r": (-?[\d.]+),", asked))
    threshold = read_probe_file(clone.folder / "demo" / "cheating.onnx").manifest.calibrations[0].threshold
    assert copied > threshold > sorted_
    text = first_score['probescore score "1 5 7 7 8 <eos>" --prompt "sort 2 0 0 7 ? cache 1 5 7 7 8 answer"']
    assert float(re.search(r"mean (-?[\d.]+)", text)[1]) == pytest.approx(copied, abs=0.02)
    assert "<html" in (clone.folder / "demo" / "rollouts.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_reward(first_reward: dict[str, str], clone: Clone) -> None:
    rollouts, copied = map(int, re.search(r"(\d+) rollouts, (\d+) of", first_reward["head -n 2 demo/labelled.jsonl"]).groups())
    fitted = first_reward["python examples/first_reward/fit.py"]
    auroc, low = map(float, re.search(r"AUROC ([\d.]+) \(([\d.]+) to", fitted).groups())
    manifest = read_probe_file(clone.folder / "demo" / "copied.onnx").manifest
    assert rollouts == 2000
    assert 0.02 < copied / rollouts < 0.2
    assert auroc >= low >= 0.9
    assert manifest.calibrations[0].false_positive_rate <= 0.01
    assert manifest.evaluations[0].value == pytest.approx(auroc, abs=0.001)
    assert "<html" in (clone.folder / "demo" / "copied.html").read_text()


STEPS = """\
head -n 800 demo/labelled.jsonl > demo/fit.jsonl
tail -n +801 demo/labelled.jsonl > demo/calibration.jsonl
mkdir demo/probes
probescore probes fit demo/fit.jsonl --model demo/model --pool mean -o demo/probes/copies.onnx --report demo/report.html
probescore probes calibrate demo/probes/copies.onnx demo/calibration.jsonl --model demo/model --false-positive-rate 0.05 \
  -o demo/copies-2.onnx --version 2
probescore probes verify demo/copies-2.onnx --model demo/model
"""
SERVE = "probescore serve --model demo/model --probes demo/probes --admin"
SCORE = 'probescore score "1 5 7 7 8 <eos>" --prompt "sort 2 0 0 7 3 cache 1 5 7 7 8 answer" --json'
REPLACE = """\
mv demo/copies-2.onnx demo/probes/
probescore probes reload
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_labelled_rollouts_to_a_probe_that_is_replaced_live_each_step_is_one_command(
    first_reward: dict[str, str], clone: Clone
) -> None:
    """As `make truth` does it on a trained model, here on the demo's."""
    assert "wrote demo/copied.onnx" in first_reward["python examples/first_reward/fit.py"]  # with its rollouts
    page = "\n".join(
        f"```bash{title}\n{commands}```\n"
        for title, commands in (
            ("", STEPS),
            (f' title="{SECOND_TERMINAL}"', f"{SERVE}\n"),
            ("", "probescore info --wait 60\n"),
            ("", f"{SCORE} > demo/before.json\n"),
            ("", REPLACE),
            ("", f"{SCORE} > demo/after.json\n"),
        )
    )
    (clone.folder / "steps.md").write_text(page)
    done = follow(clone.folder / "steps.md", clone)
    folder = clone.folder / "demo"
    first, second = (read_probe_file(folder / "probes" / name).manifest for name in ("copies.onnx", "copies-2.onnx"))
    assert (first.graph_sha256, first.version, second.version) == (second.graph_sha256, "1", "2")
    assert "copies@2 can be served" in done["probescore probes verify demo/copies-2.onnx --model demo/model"]
    assert json.loads((folder / "report.json").read_text())["evidence"]["test"]["value"] > 0.9
    assert "<svg" in (folder / "report.html").read_text()
    before, after = (json.loads((folder / name).read_text())["scores"]["copies"] for name in ("before.json", "after.json"))
    assert (before.pop("version"), after.pop("version")) == ("1", "2")
    assert before == after
    assert before["reduced"][0][0][0] > max(each.calibrations[0].threshold for each in (first, second))  # it is a copy


@pytest.mark.parametrize("page", sorted(TUTORIALS.glob("*.md")), ids=lambda page: page.stem)
def test_a_file_that_a_page_shows_is_the_one_in_the_clone(page: Path) -> None:
    files = [block for block in blocks_of(page) if block.language == "python"]
    assert files or page.stem == "first-probe"  # a page of commands alone
    for file in files:
        assert (REPOSITORY / file.title).read_text() == file.text, f"{page.name}, line {file.line}: not {file.title}"


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("```bash\necho 5 apples\n```\n\n```text\n5 pears\n```\n", "printed\n5 apples"),
        ("```bash\nfalse\necho 5 apples\n```\n", "line 1: false"),
        ('```bash title="in a second terminal"\nfalse\n```\n\n```bash\nsleep 1\n```\n\n```text\n```\n', "ended by itself"),
        ("- a list\n\n  ```bash\n  true\n  ```\n", "a block that is not read"),
    ],
)
def test_a_page_that_is_wrong_is_found_out(page: str, complaint: str, clone: Clone, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(page)
    with pytest.raises(AssertionError, match=complaint):
        follow(tmp_path / "page.md", clone)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("AUROC 0.9 (0.8 to 1.0)", "AUROC 0.953 (0.912  to 0.99)\n", True),
        ("AUROC 0.9", "AUROC nan", False),
        ("mean 7.0 flagged", "mean -7.1 not flagged", False),
        ("a … z", "a b\nc z", True),
        ("a … z", "a b c", False),
        ("a z", "a b z", False),
        ("·━━ 1", "··━ 22,400", True),
    ],
)
def test_what_is_shown_is_compared_in_words(shown: str, printed: str, same: bool) -> None:
    assert looks_like(shown, printed) == same
