"""Whatever the standard streams are, nothing is lost, and nothing that others wrote is obeyed by a terminal."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.streams import LOOKALIKES
from probescore_server.cli.common.visible import one_line, spelt_out, visible_json

HOSTILE = ["\x1b[31mred", "\x1b]0;title\x07", "\x9b31m", "a\rb", "\x7f", "\u202eright to left", "\u2028", "\ud800"]
CLI = [sys.executable, "-m", "probescore_server.cli"]


def has_command(text: str) -> bool:
    return any(not character.isprintable() and character not in "\n\t" for character in text)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_console_spells_out_what_a_terminal_would_obey_wherever_it_stands(hostile: str) -> None:
    console = new_console()
    console.file = io.StringIO()
    table = Table(title=Text(hostile))
    table.add_column(Text(hostile))
    table.add_row(Text(hostile), hostile.replace("[", "\\["))
    console.print(Text(hostile), hostile.replace("[", "\\["), table, soft_wrap=True)

    assert not has_command(console.file.getvalue())


@pytest.mark.parametrize("hostile", HOSTILE)
def test_json_for_a_terminal_has_the_same_values_and_no_command(hostile: str) -> None:
    written = visible_json(json.dumps({hostile: [hostile]}, ensure_ascii=False))

    assert not has_command(written)
    assert json.loads(written) == {hostile: [hostile]}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_message_is_one_line_without_a_command(hostile: str) -> None:
    assert not has_command(one_line(f"{hostile}\n{hostile}"))
    assert "\n" not in one_line(f"{hostile}\n{hostile}")


def test_text_that_is_laid_out_keeps_its_lines() -> None:
    assert spelt_out("a\n\tb") == "a\n\tb"


@pytest.mark.parametrize(
    "arguments", [["serve", "--model", "{}", "--port", "x\x1b[31m"], ["score", "{}/no.jsonl"], ["probes", "inspect", "{}"]]
)
def test_no_escape_sequence_of_a_file_name_reaches_the_terminal(tmp_path: Path, arguments: list[str]) -> None:
    folder = tmp_path / "\x1b[31mred"
    folder.mkdir()
    ran = subprocess.run([*CLI, *(word.format(folder) for word in arguments)], capture_output=True, text=True, timeout=120, check=False)

    assert ran.returncode in (1, 2)
    assert not has_command(ran.stdout + ran.stderr)
    assert "⟨1B⟩" in ran.stderr or "\\x1b" in ran.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_degrades_where_an_encoding_lacks_a_character(probescore, probe_files: dict[str, Path], encoding: str) -> None:
    ran = probescore("probes", "inspect", probe_files["cheating"], PYTHONIOENCODING=encoding)

    assert (ran.returncode, ran.stderr) == (0, "")
    assert ("✓" if encoding == "utf-8" else "+") in ran.stdout


def test_json_is_the_same_in_every_encoding(probescore) -> None:
    line = json.dumps({"prompt": "w5", "completion": {"text": "w7", "id": "né…\u4f60\x9b"}, "label": "ja…"}, ensure_ascii=False)
    answers = [
        json.loads(probescore("score", "-", "--json", stdin=line, PYTHONIOENCODING=f"{name}:surrogateescape").stdout)
        for name in ("ascii", "utf-8")
    ]

    assert answers[0] == answers[1]
    assert (answers[1]["id"], answers[1]["label"]) == ("né…\u4f60\x9b", "ja…")


def test_what_is_drawn_has_an_ascii_lookalike() -> None:
    assert all(alike.isascii() for alike in LOOKALIKES.values())


@pytest.mark.parametrize("closed", ["2>&-", "1>&-", "0<&-", "0<&- 1>&- 2>&-"])
def test_a_closed_stream_changes_no_outcome(served, tmp_path: Path, closed: str) -> None:
    """Given a page to write, then it is there, also where nobody hears or says anything."""
    page = tmp_path / "page.html"
    command = " ".join([*CLI, "score", "w5", "--html", str(page)])
    environment = {**os.environ, "PROBESCORE_ADDRESS": served.address}
    ran = subprocess.run(["bash", "-c", f"{command} {closed}"], env=environment, timeout=120, check=False, capture_output=True)

    assert ran.returncode == 0
    assert b"Traceback" not in ran.stdout + ran.stderr
    assert page.read_text().endswith("</html>\n")


def test_an_error_where_stderr_is_closed_is_an_exit_code() -> None:
    ran = subprocess.run(["bash", "-c", f"{' '.join(CLI)} score no-such.jsonl 2>&-"], timeout=120, check=False, capture_output=True)

    assert (ran.returncode, ran.stdout) == (2, b"")


def test_a_reader_that_has_read_enough_is_no_error_of_input(served, tmp_path: Path) -> None:
    rollouts = tmp_path / "rollouts.jsonl"
    rollouts.write_text('{"prompt": "w5", "completion": "w6"}\n' * 200)
    command = f"set -o pipefail; {' '.join(CLI)} score {rollouts} --json | head -n 1"
    environment = {**os.environ, "PROBESCORE_ADDRESS": served.address}
    ran = subprocess.run(["bash", "-c", command], env=environment, timeout=120, check=False, capture_output=True, text=True)

    assert json.loads(ran.stdout)["group"] == 0
    assert ran.stderr == ""
    assert ran.returncode == 1


def test_a_page_has_all_that_was_scored_though_the_reader_of_the_rest_has_left(served, tmp_path: Path) -> None:
    rollouts, page = tmp_path / "rollouts.jsonl", tmp_path / "page.html"
    rollouts.write_text('{"prompt": "w5", "completion": "w6"}\n' * 200)
    command = f"set -o pipefail; {' '.join(CLI)} score {rollouts} --json --html {page} | head -n 1"
    environment = {**os.environ, "PROBESCORE_ADDRESS": served.address}
    ran = subprocess.run(["bash", "-c", command], env=environment, timeout=120, check=False, capture_output=True, text=True)

    assert (ran.returncode, ran.stderr) == (0, "")
    assert '"200 scored rollouts"' in page.read_text("utf-8")
