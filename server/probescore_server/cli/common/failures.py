"""Shows failures of commands as one line on standard error and an exit code, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from probescore.errors import InvalidRequestError, ProbescoreError
from probescore_server.cli.common.streams import leave_stdout
from probescore_server.cli.common.visible import one_line
from probescore_server.errors import InvalidRequest, StartupError

FAILED = 1
"""Exit code of a command that could not do its work: there was no server, a file was refused, or a check failed."""
WRONG_INPUT = 2
"""Exit code of a command with wrong input: an argument, a line of a file, or a request that violates the protobuf contract."""


@contextmanager
def one_line_failures(extra: str = "server") -> Iterator[None]:
    """Context manager that turns every expected failure of a command into one line on standard error and an exit code.

    Args:
        extra: the extra (optional dependencies, as in ``pip install 'probescore[server]'``) with the packages that the command imports.
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
    """Adds a command that only prints which packages to install, in place of a command that cannot be imported without them."""

    @app.command(command, help=help_text, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def _needs_extra() -> None:
        _stop(f"{command} needs {missing.name}: pip install 'probescore[{extra}]'", FAILED)


def say(message: object) -> None:
    """Prints a message as one line on standard error, with control characters made harmless for the terminal."""
    typer.echo("probescore: " + one_line(message), err=True)


def _stop(message: object, code: int) -> None:
    say(message)
    raise typer.Exit(code) from None
