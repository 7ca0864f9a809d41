"""Failures as people should see them: one line on stderr and an exit code, never a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from probescore.errors import InvalidRequestError, ProbescoreError
from probescore_server.cli.common.streams import leave_stdout
from probescore_server.cli.common.visible import one_line
from probescore_server.errors import InvalidRequest, StartupError

FAILED = 1
"""The work could not be done: no server, a file that is refused, a check that failed."""
WRONG_INPUT = 2
"""What was asked for is wrong: an argument, a line of a file, a request that breaks the contract."""


@contextmanager
def one_line_failures(extra: str = "server") -> Iterator[None]:
    """Turns every failure that is foreseen into its line and its exit code.

    Args:
        extra: of this distribution, which brings what a command imports.
    """
    try:
        yield
    except BrokenPipeError:
        leave_stdout()
        raise typer.Exit(FAILED) from None
    except (InvalidRequestError, InvalidRequest, ValueError) as error:
        _stop(error, WRONG_INPUT)
    except OSError as error:
        _stop(f"{error.filename}: {error.strerror}" if error.filename else error, WRONG_INPUT)
    except (ProbescoreError, StartupError) as error:
        _stop(error, FAILED)
    except ModuleNotFoundError as error:
        _stop(f"needs {error.name}: pip install 'probescore[{extra}]'", FAILED)


def needs_extra(app: typer.Typer, command: str, help_text: str, extra: str, missing: ModuleNotFoundError) -> None:
    """Puts a command in its place that says what to install."""

    @app.command(command, help=help_text, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def _needs_extra() -> None:
        _stop(f"{command} needs {missing.name}: pip install 'probescore[{extra}]'", FAILED)


def say(message: object) -> None:
    """One line on stderr, in which nothing is obeyed by a terminal."""
    typer.echo("probescore: " + one_line(message), err=True)


def _stop(message: object, code: int) -> None:
    say(message)
    raise typer.Exit(code) from None
