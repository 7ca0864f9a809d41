"""Implements ``probescore serve``, whose flags are the fields of ``ServerSettings``."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import structlog
import typer
from pydantic.fields import FieldInfo

from probescore_server.cli.common.visible import one_line
from probescore_server.errors import StartupError
from probescore_server.front.server import serve as run_server
from probescore_server.hub_probes import local_paths
from probescore_server.logs import configure_logs
from probescore_server.settings import ENVIRONMENT_PREFIX, ServerSettings, load_settings

logger = structlog.get_logger(__name__)

BAD_SETTINGS = 2
CANNOT_START = 1

PANELS = {
    "What is served": (
        "model",
        "revision",
        "probes",
        "watch_probes",
        "probe_pin_seconds",
        "max_retired_versions",
        "deeper_probes",
        "accept_mismatch",
        "trust_remote_code",
        "allow_activations",
        "readings_root",
        "max_readings",
    ),
    "Compute": ("devices", "device_map", "dtype", "threads_per_worker", "max_batch_tokens", "kv_cache_bytes", "device_memory_fraction"),
    "Addresses": ("host", "port", "unix_socket", "metrics_host", "metrics_port"),
    "Limits": (
        "max_message_bytes",
        "max_rollout_tokens",
        "max_request_tokens",
        "max_queue_tokens",
        "max_request_rollouts",
        "max_follow_ups",
        "max_reductions",
        "max_spans",
        "max_span_scores",
        "max_request_values",
        "max_activation_bytes",
        "max_activation_bytes_in_flight",
        "max_text_bytes_per_token",
        "max_chat_messages",
        "max_chat_seconds",
        "max_calls",
        "max_in_flight_bytes",
        "max_connections",
        "max_calls_per_connection",
    ),
    "Operation": (
        "drain_seconds",
        "worker_restart_seconds",
        "worker_silent_seconds",
        "worker_start_seconds",
        "step_seconds",
        "step_seconds_per_1000_tokens",
        "keepalive_seconds",
        "min_client_ping_seconds",
        "max_connection_age_seconds",
        "interceptors",
        "admin",
        "log_format",
        "log_level",
    ),
}

HELP = f"""
Serve a frozen model and its probes over gRPC.

Every setting below can be a flag, an environment variable ({ENVIRONMENT_PREFIX}MAX_BATCH_TOKENS=65536; lists take commas) or a line of the
YAML file of --config (max_batch_tokens: 65536). A flag overrides a variable, and a variable overrides the file.

The server listens at once. Its health service says SERVING once the model is loaded and every probe's golden scores are recomputed.

[bold]Examples[/bold]

  probescore serve --model ./model --probes ./probes

  probescore serve --model Qwen/Qwen3-0.6B --probes cheating.onnx --devices cuda:0 --dtype bfloat16 --host 0.0.0.0

  PROBESCORE_MODEL=./model probescore serve --config probescore.yaml --unix-socket /run/probescore.sock

[bold]Exit codes[/bold]: 0 after SIGTERM or Ctrl-C, 1 if it cannot start (port taken, model or probe refused), 2 for a wrong setting.
"""


def register(app: typer.Typer) -> None:
    """Adds the command ``serve`` to the command line."""
    app.command("serve", help=HELP)(_serve)


def _serve(config: Path | None, **flags: Any) -> None:  # noqa: ANN401
    try:
        settings = load_settings({name: value for name, value in flags.items() if value is not None}, config)
    except StartupError as error:
        typer.echo(one_line(f"probescore serve: {error}"), err=True)
        raise typer.Exit(BAD_SETTINGS) from None
    configure_logs(settings.log_format, settings.log_level)
    try:
        probes = local_paths(settings.probes, lambda name: logger.info("probe from the hub", probe=name))
        asyncio.run(run_server(settings.model_copy(update={"probes": probes})))
    except StartupError as error:
        logger.error(f"cannot start: {error}")
        raise typer.Exit(CANNOT_START) from None


def _flags() -> list[inspect.Parameter]:
    config = typer.Option("--config", help="The path of a YAML file with settings.", show_default=False)
    return [
        inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, config]),
        *(_flag(name, ServerSettings.model_fields[name], panel) for panel, names in PANELS.items() for name in names),
    ]


def _flag(name: str, field: FieldInfo, panel: str) -> inspect.Parameter:
    """Returns the command-line option for a field of the server's settings.

    Values remain strings: the settings class checks the values of options in the same way as values from the environment and the settings
    file.
    """
    flag = "--" + name.replace("_", "-")
    kind: Any = str
    metavar: str | None = "TEXT"
    if field.annotation is bool:
        kind, metavar = bool, None
        flag = f"{flag}/--no-{flag[2:]}"
    elif get_origin(field.annotation) is tuple:
        kind = list[str]
    elif get_origin(field.annotation) is Literal:
        metavar = "|".join(get_args(field.annotation))
    elif field.annotation in (int, float):
        metavar = "NUMBER"
    option = typer.Option(flag, help=_help(name, field), rich_help_panel=panel, show_default=False, metavar=metavar)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def _help(name: str, field: FieldInfo) -> str:
    examples = f" For example {' or '.join(map(str, field.examples))}." if field.examples else ""
    return f"{field.description}{examples} [dim]{ENVIRONMENT_PREFIX}{name.upper()}, default: {default_of(field)}[/dim]"


def default_of(field: FieldInfo) -> str:
    """Returns the default value of a server setting as text for the command's help."""
    if field.is_required():
        return "none, required"
    match field.get_default():
        case bool(switch):
            return "on" if switch else "off"
        case float(number):
            return f"{number:g}"
        case tuple(words):
            return ",".join(words) or "none"
        case None | "":
            return "none"
        case word:
            return str(word)


# Typer reads a command's options off its signature.
_serve.__signature__ = inspect.Signature(_flags())  # type: ignore[attr-defined]
