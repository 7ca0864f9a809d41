"""A tutorial as its reader follows it: the page's own blocks, one after another, and what the page says that they print.

A block's first line says what it is. ``bash`` is typed, and goes on running until the page is done if its title is ``in a second
terminal``; ``python`` is the file of the clone that its title names; ``text`` is what the commands before it print.

Needs nothing but the standard library: trainers' environments use it too.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
TUTORIALS = REPOSITORY / "docs" / "tutorials"
SECOND_TERMINAL = "in a second terminal"
ADDRESS = "localhost:50051"

KEPT_MODEL = REPOSITORY / "build" / "tutorials" / "model"
"""Where the demo's model stays between runs, since its training takes a minute; the demo itself finds out whether it is the right one."""

_FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
_VARIES = re.compile(rf"(…|[·━]+|{_NUMBER})")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: ``bash``, ``python`` or ``text``.
        title: of the block, or empty.
        text: what is in it.
        line: where it begins.
    """

    language: str
    title: str
    text: str
    line: int


@dataclass(frozen=True)
class Clone:
    """A folder that looks to a reader's commands like a clone in which everything is installed.

    Attributes:
        folder: where they are typed.
        environment: the Python environment that ``.venv`` is.
        port: of the server, in place of the port that the pages name.
    """

    folder: Path
    environment: Path
    port: int

    @classmethod
    def make(cls, folder: Path, environment: Path, others: dict[str, Path] | None = None) -> Clone:
        """Makes one, with further environments by the folders that the pages name."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shutil.copytree(REPOSITORY / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / ".venv").symlink_to(environment)
        for name, other in (others or {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(other)
        KEPT_MODEL.mkdir(parents=True, exist_ok=True)
        (folder / "demo").mkdir()
        (folder / "demo" / "model").symlink_to(KEPT_MODEL)
        return cls(folder, environment, port)

    @property
    def replaced(self) -> dict[str, str]:
        """All that is not done as the pages say it."""
        return {
            "make demo": _recipe_of_demo(),  # here there is nothing to install
            "make .venv-trainers/trl/installed": "test -x .venv-trainers/trl/bin/python",  # `make test-trainers` begins with this command
            "make .venv-trained/installed": "test -x .venv-trained/bin/python",  # and `make test-truth` with this one
            ADDRESS: f"localhost:{self.port}",
        }

    @property
    def variables(self) -> dict[str, str]:
        """The environment of its terminals: the port, the width and form of what is printed, and an active ``.venv``."""
        return {
            **os.environ,
            "PATH": f"{self.environment / 'bin'}:{os.environ['PATH']}",
            "PROBESCORE_PORT": str(self.port),
            "PROBESCORE_METRICS_PORT": "0",
            "PROBESCORE_LOG_FORMAT": "console",
            "PROBESCORE_ADDRESS": f"localhost:{self.port}",
            "COLUMNS": "88",
        }

    def read(self, text: str) -> str:
        """What a page says, as it is done here."""
        for said, done in self.replaced.items():
            text = text.replace(said, done)
        return text

    def write(self, file: Block) -> None:
        """Writes a file as the page shows it."""
        (self.folder / file.title).write_text(self.read(file.text))

    def type(self, command: Block) -> str:
        """Runs a block in the first terminal and returns what it prints."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.read(command.text)],
            cwd=self.folder,
            env=self.variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"line {command.line}: {command.text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    @contextmanager
    def leave_running(self, command: Block) -> Iterator[Callable[[], str]]:
        """Runs a block in a second terminal, ends it with Ctrl-C, and gives what it has printed so far."""
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", self.read(command.text)],
                cwd=self.folder,
                env=self.variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

            def printed() -> str:
                log.seek(0)
                return log.read()

            try:
                yield printed
                assert process.poll() is None, f"line {command.line}: it ended by itself: {command.text}\n{printed()}"
                os.killpg(process.pid, signal.SIGINT)
                process.wait(60)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    text = page.read_text()
    blocks = [Block(found[1], found[2] or "", found[3], text.count("\n", 0, found.start()) + 1) for found in _FENCE.finditer(text)]
    assert len(blocks) * 2 == len(re.findall("^ *```", text, re.MULTILINE)), f"{page.name}: a block that is not read"
    return blocks


def follow(page: Path, clone: Clone, leave_out: str = "") -> dict[str, str]:
    """Does what a page says, and checks that it prints what the page shows.

    Args:
        page: a tutorial.
        clone: where its reader is.
        leave_out: commands in which this stands are not typed, and what the page shows of them is not checked.

    Returns:
        What each command printed, by the command's last line.
    """
    printed: dict[str, Callable[[], str]] = {}
    shown: list[tuple[Block, str]] = []
    typed = ""
    with ExitStack() as terminals:
        for block in blocks_of(page):
            if block.language == "python":
                clone.write(block)
            elif block.language == "bash":
                typed = "" if leave_out and leave_out in block.text else block.text.splitlines()[-1]
                if not typed:
                    continue
                if block.title == SECOND_TERMINAL:
                    printed[typed] = terminals.enter_context(clone.leave_running(block))
                else:
                    printed[typed] = functools.partial(str, clone.type(block))
            elif typed:
                shown.append((block, typed))
        outputs = {command: output() for command, output in printed.items()}
    for block, command in shown:
        assert looks_like(block.text, outputs[command]), f"{page.name}, line {block.line}: shown\n{block.text}\nprinted\n{outputs[command]}"
    return outputs


def looks_like(shown: str, printed: str) -> bool:
    """Whether a printed text begins with the words that a page shows. Numbers may be others, and "…" stands for anything."""
    pattern = ""
    for index, piece in enumerate(_VARIES.split(" ".join(shown.split()))):
        if index % 2 == 0:
            pattern += re.escape(piece)
        else:
            pattern += {"…": ".*?", "·": "[·━]+", "━": "[·━]+"}.get(piece[0], _NUMBER)
    return re.match(pattern, " ".join(printed.split())) is not None


def _recipe_of_demo() -> str:
    """What ``make demo`` runs."""
    found = re.search(r"^demo:.*\n\t@(.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert found, "Makefile: no target demo"
    return found[1].replace("$(BIN)", ".venv/bin")
