"""The command line as a whole: help that teaches, and a clear word where something is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import typer

from probescore import InvalidRequestError, UnavailableError
from probescore_server.cli.common.failures import one_line_failures
from probescore_server.errors import ModelRefused, ProbeRefused

HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
sys.argv = ["probescore", *{arguments!r}]
from probescore_server.cli import main
main()
"""


def without(hidden: set[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line on a machine that lacks some packages."""
    code = HIDE.format(hidden=hidden, arguments=arguments)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_without_typer_it_says_what_to_install():
    ran = without({"typer"}, "score", "x")

    assert ran.returncode == 1
    assert ran.stderr == "probescore: the command line needs more than the client: pip install 'probescore[cli]'\n"


def test_without_the_server_the_other_commands_work():
    ran = without({"pydantic", "pydantic_settings", "onnx", "torch"}, "--help")

    assert ran.returncode == 0
    assert "score" in ran.stdout


def test_without_the_server_serve_says_what_to_install():
    ran = without({"pydantic_settings", "torch"}, "serve", "--model", "x")

    assert ran.returncode == 1
    assert ran.stderr == "probescore: serve needs pydantic_settings: pip install 'probescore[server]'\n"


def test_without_onnx_inspect_says_what_to_install(tmp_path):
    ran = without({"onnx"}, "probes", "inspect", str(tmp_path))

    assert ran.returncode == 1
    assert ran.stderr == "probescore: needs onnx: pip install 'probescore[server]'\n"


def test_it_knows_its_version(probescore):
    assert probescore("--version").stdout == f"probescore {version('probescore')}\n"


@pytest.mark.parametrize("command", ["score", "info", "probes", "serve", "activations"])
def test_every_command_is_in_the_help(probescore, command):
    assert command in probescore("--help").stdout


def test_the_help_of_score_gives_the_format_of_a_line(probescore):
    text = " ".join(probescore("score", "--help", COLUMNS="160").stdout.split())

    assert '{"prompt": PROMPT, "completions": [COMPLETION, …]}' in text
    assert '"mask": [0, 1, …]' in text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequestError("groups[0]: wrong"), 2),
        (ValueError("two\nlines"), 2),
        (FileNotFoundError(2, "No such file or directory", "x.jsonl"), 2),
        (UnavailableError("no connection"), 1),
        (ModelRefused("not a decoder"), 1),
        (ProbeRefused("x.onnx", "graph", "NaN", "numbers"), 1),
        (ModuleNotFoundError("No module named 'onnx'", name="onnx"), 1),
    ],
)
def test_a_foreseen_failure_is_one_line_and_an_exit_code(error, code, capsys):
    with pytest.raises(typer.Exit) as stopped, one_line_failures():
        raise error

    written = capsys.readouterr()
    assert stopped.value.exit_code == code
    assert written.err.startswith("probescore: ")
    assert written.err.count("\n") == 1
    assert written.out == ""


def test_a_message_cannot_command_the_terminal(capsys):
    with pytest.raises(typer.Exit), one_line_failures():
        raise UnavailableError("\x1b[2J")

    assert capsys.readouterr().err == "probescore: ⟨1B⟩[2J\n"


COMMANDS_OF_A_SERVER = (["score"], ["info"], ["probes", "list"], ["sleep"], ["wake"], ["bench"], ["healthcheck"], ["gateway"])


@pytest.mark.parametrize("command", COMMANDS_OF_A_SERVER, ids=" ".join)
def test_the_address_of_a_server_is_given_in_one_way(command):
    wide = {**os.environ, "COLUMNS": "250"}
    help_of = [sys.executable, "-m", "probescore_server.cli", *command, "--help"]
    ran = subprocess.run(help_of, capture_output=True, text=True, timeout=120, check=False, env=wide)

    assert "--address" in ran.stdout
    assert "-a" in ran.stdout
    assert "PROBESCORE_ADDRESS" in ran.stdout
    assert "ADDRESS" in ran.stdout.replace("PROBESCORE_ADDRESS", "")
