"""Implements ``probescore activations``, which computes a model's activations on a file of rollouts and writes them to a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from probescore.types import Scope
from probescore_server.activations import MAX_BATCH_BYTES
from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import one_line_failures, say
from probescore_server.cli.common.interruption import Interrupted, interruptible
from probescore_server.cli.common.progress import RolloutProgress
from probescore_server.cli.rollout_lines import read_rollout_file
from probescore_server.cli.steps import CheckSteps

HELP = """
Read activations of rollouts and write them to a directory, to fit probes on or to look at.

DATA is a file of rollouts, or - for standard input: JSON lines, as 'probescore score' reads them. Labels are kept with what is written.

A tap is where activations are read: resid_pre.N, resid_post.N, attn_out.N, mlp_out.N of block N (from 0), or final_norm. All that are asked
for are read in one pass. Of each completion, and of each of its spans, the tokens that count are pooled (mean, last, max), or every token's
activations are written (tokens): pooled, all layers of thousands of rollouts take a few hundred megabytes; of every token, take few taps.

The directory gets an index and safetensors files. What they will take is told before, and refused if there is no room. A run that was
stopped goes on where it is asked for again, and ends with the same bytes.

[bold]Examples[/bold]

  probescore activations rollouts.jsonl --model ./model --taps 'resid_post.*' --pool mean,last -o activations

  probescore activations rollouts.jsonl --model ./model --taps resid_post.14 --pool tokens --store-dtype bfloat16 -o tokens

[bold]Exit codes[/bold]: 0 if everything is written, 1 if the model cannot be loaded, 2 for wrong input or no room, 130 after Ctrl-C.
"""


def register(app: typer.Typer) -> None:
    """Adds the command ``activations`` to the command line."""
    app.command("activations", help=HELP)(_activations)


def _activations(
    data: Annotated[str, typer.Argument(help="A file of rollouts, or -.", show_default=False)],
    model: Annotated[str, typer.Option("--model", "-m", help="A directory, or an id on the Hugging Face hub.", show_default=False)],
    taps: Annotated[
        list[str],
        typer.Option("--taps", "-t", help="Names or patterns, with commas: resid_post.*, *.14.", show_default=False, metavar="TAPS"),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write.", show_default=False, metavar="DIR")],
    pool: Annotated[str, typer.Option("--pool", help="Of mean, last, max and tokens, with commas.", metavar="POOLS")] = "mean,last",
    scope: Annotated[str, typer.Option("--scope", help="Which tokens: completion, prompt or all.")] = Scope.COMPLETION.value,
    store_dtype: Annotated[
        str, typer.Option("--store-dtype", help="float32, bfloat16 or float16, of which a number that is too large is refused.")
    ] = "float32",
    revision: Annotated[str, typer.Option("--revision", help="Branch, tag or commit on the hub.", show_default=False)] = "",
    dtype: Annotated[str, typer.Option("--dtype", help="What the model computes in: float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda:0.")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings.")] = False,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens/--no-special-tokens", help="Whether prompts that are texts get the tokenizer's special tokens (BOS)."
        ),
    ] = True,
    max_batch_bytes: Annotated[
        int, typer.Option("--max-batch-bytes", help="Of activations held at once, in float32 on the device.", min=1, metavar="BYTES")
    ] = MAX_BATCH_BYTES,
) -> None:
    with one_line_failures():
        from probescore_server.activation_store.writing import StorePlan, check_target, free_bytes
        from probescore_server.engine.engine import Engine

        groups = read_rollout_file(data, add_special_tokens=special_tokens)
        if not groups:
            raise ValueError(f"{data}: there are no rollouts in it")
        check_target(output)
        patterns = _listed(",".join(taps))
        console = new_console()
        with CheckSteps(console) as steps:
            engine = Engine.load(
                model,
                taps=patterns,
                revision=revision,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
                report=steps.begin,
            )
        plan = StorePlan.make(
            engine,
            groups,
            taps=patterns,
            pool=_listed(pool),
            scope=scope,
            dtype=store_dtype,
            labels=[group.labels for group in groups],
            max_batch_bytes=max_batch_bytes,
        )
        planned = f"{plan.completions:,} completions at {len(plan.index.taps)} taps: {_size(plan.bytes)} in {len(plan.index.shards)} files"
        console.print(f"{planned}; {_size(free_bytes(output))} are free")
        done = 0
        with interruptible(), RolloutProgress(plan.completions, "reading", "read") as progress:

            def advance(finished: int, _total: int) -> None:
                nonlocal done
                progress.advance(finished - done)
                done = finished

            try:
                plan.write(output, advance)
            except Interrupted:
                say(f"stopped after {done} of {plan.completions} completions; the same command goes on with the file that it was at")
                raise
        console.print(f"wrote {output}", soft_wrap=True, markup=False)


def _listed(written: str) -> list[str]:
    return [name.strip() for name in written.split(",") if name.strip()]


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
