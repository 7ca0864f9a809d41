"""Implements ``probescore info``, which shows the model, worker processes, limits, probes and readings of the server at an address."""

from __future__ import annotations

import typer
from rich.table import Table

from probescore import Limits, ModelInfo, WorkerInfo
from probescore_server.cli.common.connection import DEFAULT_ADDRESS, Address, Wait, connected
from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import one_line_failures
from probescore_server.cli.tables import facts_table, probes_table, readings_table, safe


def register(app: typer.Typer) -> None:
    """Adds the command ``info`` to the command line."""
    app.command("info")(_info)


def _info(address: Address = DEFAULT_ADDRESS, wait: Wait = 0) -> None:
    """Show the model, workers, limits, probes and readings of the server at an address."""
    with one_line_failures():
        with connected(address, wait) as client:
            info, probes = client.get_server_info(), client.list_probes()
        console = new_console()
        console.print(f"[bold]probescore {safe(info.server_version)}[/bold] at {safe(address)}\n", soft_wrap=True)
        tables = (
            _model_table(info.model, info.tokenizer_fingerprint),
            workers_table(info.workers),
            _limits_table(info.limits, info.model.max_position_embeddings, info.activation_taps),
        )
        readings = (readings_table(info.readings),) if info.readings else ()
        for table in (*tables, probes_table(probes), *readings):
            console.print(table, "")


def _model_table(model: ModelInfo, tokenizer_fingerprint: str) -> Table:
    table = facts_table("Model")
    table.add_row("id", safe(model.id + (f" at {model.revision}" if model.revision else "")))
    table.add_row("architecture", f"{safe(model.model_type)}, hidden size {model.hidden_size:,}, vocabulary {model.vocab_size:,}")
    table.add_row("blocks", f"{model.num_loaded_layers} of {model.num_hidden_layers} loaded, as deep as a probe reads")
    table.add_row("positions", f"{model.max_position_embeddings:,}" if model.max_position_embeddings else "unknown")
    table.add_row("fingerprint", safe(model.fingerprint))
    table.add_row("tokenizer", safe(tokenizer_fingerprint) or "none: only token ids can be scored")
    return table


def workers_table(workers: tuple[WorkerInfo, ...]) -> Table:
    """Returns a table with one row for each worker process of a server: whether the worker is ready, and how the worker runs the model."""
    table = facts_table("Workers")
    for worker in workers:
        state = "[yellow]asleep[/yellow]" if worker.asleep else "[green]ready[/green]" if worker.ready else "[red]not ready[/red]"
        restarts = f", restarted {worker.restarts} times" if worker.restarts else ""
        table.add_row(safe(worker.device), f"{state}, {safe(worker.dtype)}, {safe(worker.execution_path)} path{restarts}")
    return table


def _limits_table(limits: Limits, positions: int, activation_taps: tuple[str, ...]) -> Table:
    """Returns a table of a server's limits. A rollout may have no more tokens than the model has positions, whatever the server allows; 0
    positions = not known.
    """
    table = facts_table("Limits")
    told = limits.max_request_rollouts > 0  # a server of an earlier version does not report all limits
    if 0 < positions < limits.max_rollout_tokens:
        table.add_row("one rollout", f"{positions:,} tokens, the model's positions (max_rollout_tokens is {limits.max_rollout_tokens:,})")
    else:
        table.add_row("one rollout", f"{limits.max_rollout_tokens:,} tokens")
    if told:
        table.add_row(
            "", f"{limits.max_follow_ups:,} follow-ups, {limits.max_spans:,} spans each, which read {limits.max_span_scores:,} scores"
        )
    table.add_row("one request", f"{limits.max_request_tokens:,} tokens, {limits.max_message_bytes / 2**20:,.0f} MiB")
    if told:
        table.add_row("", f"{limits.max_request_rollouts:,} completions and follow-ups, {limits.max_reductions:,} reductions")
        table.add_row("its answer", f"{limits.max_request_values:,} numbers")
        if activation_taps:
            table.add_row("activations", f"{limits.max_activation_bytes / 2**20:,.0f} MiB in an answer, at {len(activation_taps)} taps")
        table.add_row("texts", f"{limits.max_text_bytes_per_token:,} bytes per token that a rollout, or a request, may have")
        table.add_row("one chat", f"{limits.max_chat_messages:,} messages, rendered within {limits.max_chat_seconds:g} s")
    table.add_row("one device batch", f"{limits.max_batch_tokens:,} tokens")
    table.add_row("queue", f"{limits.max_queue_tokens:,} tokens")
    if told:
        table.add_row("calls under way", f"{limits.max_calls:,}, with {limits.max_in_flight_bytes / 2**20:,.0f} MiB of requests")
        table.add_row("connections", f"{limits.max_connections:,}, each with {limits.max_calls_per_connection:,} calls under way")
    return table
