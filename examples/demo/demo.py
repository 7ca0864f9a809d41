"""``make demo``: from nothing to a served probe that tells cheating from honest rollouts, in a few minutes on a CPU.

Trains a small model on a task that can be cheated on, samples rollouts from it, fits a probe on one half of the problems, serves it, and
scores the other half over gRPC. The model is kept, so that the next run starts from it; everything else is done again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from steps import step


def main() -> int:
    options = arguments()
    console = Console(highlight=False)
    console.print("[bold]probescore[/bold]: a probe that sees cheating, made from nothing\n")
    with step(console, "Import torch, transformers and scikit-learn"):
        # here and not above: it takes seconds, in which something should be on the screen
        from pipeline import run

    results = run(options.folder, options.seed, console)
    console.print()
    console.print(results.screen())
    console.print(f"\nEverything is in [bold]{options.folder}[/bold]. To go on:\n")
    console.print((options.folder / "commands.sh").read_text(), soft_wrap=True, markup=False)
    return 0 if all(results.requirements.values()) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where everything is left (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the model, the problems and the rollouts (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
