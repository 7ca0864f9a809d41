"""The demo from top to bottom."""

from __future__ import annotations

import random
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
import transformers
from fitting import write_fitted_probe
from folder import write_commands, write_groups
from pretraining import Recipe, trained_model
from results import Results, evaluate
from rich.console import Console
from sampling import sample_rollouts
from serving import score_rollouts, server, show_rollouts
from steps import step
from task import draw_distinct_problems
from vocabulary import build_tokenizer

HALF = 2400
SHOWN_PROBLEMS = 25
SHOWN_PER_PROBLEM = 8


def run(folder: Path, seed: int, console: Console) -> Results:
    torch.set_num_threads(1)  # a second one gains 15% on a model this small, and loses far more on a busy machine
    transformers.utils.logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    model, probe, shown = folder / "model", folder / "cheating.onnx", folder / "rollouts.jsonl"

    tokenizer, recipe = build_tokenizer(), Recipe(seed)
    with step(console, "Train the policy from scratch, unless it is there", recipe.steps) as advance:
        policy = trained_model(recipe, tokenizer, model, lambda: advance(1))

    # all different, and one rollout of each: independent of one another, as the intervals take them to be
    problems = draw_distinct_problems(random.Random(f"problems {seed}"), 2 * HALF)
    with step(console, "Sample rollouts at temperature 1", len(problems)) as advance:
        rollouts = sample_rollouts(policy, tokenizer, problems, seed, advance)
    first_half, other_half = rollouts[:HALF], rollouts[HALF:]

    with step(console, "Fit and calibrate a linear probe on half of the problems", len(first_half)) as advance:
        fitted = write_fitted_probe(probe, model, first_half, seed, lambda: advance(1))

    with ExitStack() as stack:
        # not in the folder, whose path may be longer than a socket's may be
        socket = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "socket"
        with step(console, "Start probescore serve, which checks the probe"):
            address = stack.enter_context(server(model, probe, socket, folder / "server.log"))
        with step(console, "Score the other half over gRPC", len(other_half)) as advance:
            scores = score_rollouts(address, other_half, lambda: advance(1))
        with step(console, "Compare with baselines that only read the completion"):
            results = evaluate(first_half, other_half, scores, fitted.threshold.threshold)
        shown_problems = [problem for problem in problems[HALF : HALF + SHOWN_PROBLEMS] for _ in range(SHOWN_PER_PROBLEM)]
        write_groups(shown, sample_rollouts(policy, tokenizer, shown_problems, seed + 1, lambda _done: None))
        console.print("\nSome rollouts of the other half, as `probescore score` prints them:\n", style="bold")
        show_rollouts(address, shown, folder / "demo.html")
    (folder / "results.json").write_text(results.to_json() + "\n")
    write_commands(folder / "commands.sh", model, probe, shown)
    return results
