"""``make experiment``: what becomes of a probe while a model is trained on a reward that can be cheated, under several conditions.

Trains in TRL with the shipped adapter and a real server, records each run, audits the record, and compares what the audit says with the
truth, which only the environment knows. Without options: one seed, four conditions, some minutes on two cores. What is finished is kept,
so that a second start goes on where the first one was stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.append(str(Path(__file__).parents[1] / "demo"))

TRAINER = Path(".venv-trainers/trl/bin/python")
LONG_STEPS = 300
FULL_SEEDS = 5


def main() -> int:
    options = arguments()
    console = Console(highlight=False)
    if not options.trainer.exists():
        console.print(f"[red]{options.trainer}: no such file.[/red] `make experiment` sets up TRL's environment; else give --trainer")
        return 1
    started = time.monotonic()
    # here and not above: it takes seconds, and mistakes in the options should be seen at once
    from base import BaseSizes, make_base
    from conditions import CONDITIONS, LONG, QUICK
    from findings import found
    from report import write_report
    from runs import train
    from training_settings import RunSettings

    names = options.conditions or (list(CONDITIONS) if options.full else list(QUICK))
    if unknown := [name for name in names if name not in CONDITIONS]:
        console.print(f"[red]--conditions: {', '.join(unknown)}[/red]; there are {', '.join(CONDITIONS)}")
        return 1
    sizes = BaseSizes(options.pretraining_steps, options.fitting, options.reference)
    wanted: list[RunSettings] = []
    bases = {}
    for seed in range(options.seed, options.seed + options.seeds):
        for reports in sorted({CONDITIONS[name].reports for name in names}):
            folder = options.folder / f"seed-{seed}" / ("base-reports" if reports else "base")
            bases[seed, reports] = make_base(folder, seed, reports, sizes, console)
        for name in names:
            lengths = [options.steps, *([LONG_STEPS] if options.full and name in LONG else [])]
            for steps in lengths:
                folder = options.folder / f"seed-{seed}" / f"{name}-{steps}"
                base = str(bases[seed, CONDITIONS[name].reports].folder)
                settings = RunSettings(name, seed, base, str(folder), steps=steps, evaluated=options.evaluated)
                wanted.append(replace(settings, prompts=options.prompts, labels=options.labels))
    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[cheating]}"), TimeElapsedColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress, ThreadPoolExecutor(options.jobs) as pool:

        def run(settings: RunSettings) -> None:
            title = f"seed {settings.seed}, {settings.condition}: {CONDITIONS[settings.condition].title}"
            task = progress.add_task(title, total=settings.steps, cheating="")
            begun = time.monotonic()

            def on_step(step: int, cheating: float) -> None:
                progress.update(task, completed=step, cheating=f"cheating {cheating:4.0%}")

            train(settings, bases[settings.seed, CONDITIONS[settings.condition].reports], options.trainer, on_step)
            progress.update(task, completed=settings.steps)
            console.print(f"{title}, {settings.steps} steps: {time.monotonic() - begun:.0f} s")

        for _ in pool.map(run, wanted):
            pass
    findings = [found(settings) for settings in wanted]
    page = options.folder / "experiment.html"
    console.print(write_report(findings, page, time.monotonic() - started))
    console.print(f"\nThe page is [bold]{page}[/bold]; each run has its record, for `probescore audit RUN/record`, and its audit.html.")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("experiment"), help="where everything is left (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help=f"every condition, {FULL_SEEDS} seeds, and long runs of {LONG_STEPS} steps")
    parser.add_argument("--seeds", type=int, help=f"how many (default: 1; with --full {FULL_SEEDS})")
    parser.add_argument("--seed", type=int, default=0, help="the first (default: %(default)s)")
    parser.add_argument("--conditions", nargs="+", help="only these")
    parser.add_argument("--steps", type=int, default=80, help="of training (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=32, help="of a step, 8 rollouts each (default: %(default)s)")
    parser.add_argument("--labels", type=int, default=32, help="of a step, for the audit (default: %(default)s)")
    parser.add_argument("--evaluated", type=int, default=2048, help="rollouts at the end (default: %(default)s)")
    parser.add_argument("--pretraining-steps", type=int, default=800, help="of the model (default: %(default)s)")
    parser.add_argument("--fitting", type=int, default=2400, help="rollouts that the probe is fitted on (default: %(default)s)")
    parser.add_argument("--reference", type=int, default=5000, help="rollouts that the audit compares with (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--trainer", type=Path, default=TRAINER, help="the interpreter that has TRL (default: %(default)s)")
    options = parser.parse_args()
    options.seeds = options.seeds or (FULL_SEEDS if options.full else 1)
    options.folder = options.folder.absolute()
    return options


if __name__ == "__main__":
    sys.exit(main())
