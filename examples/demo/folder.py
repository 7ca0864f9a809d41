"""What the demo leaves behind: rollouts to score again, and the commands to do it with."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from sampling import SampledRollout
from serving import PROBESCORE


def write_groups(path: Path, rollouts: Sequence[SampledRollout]) -> None:
    """Writes rollouts as ``probescore score`` reads them, problem by problem, each completion once.

    Problems come first that were cheated on and solved too, and in each the cheating completions.
    """
    groups = [
        list({rollout.completion_ids: rollout for rollout in group}.values())
        for _, group in groupby(rollouts, lambda rollout: rollout.problem)
    ]
    groups.sort(key=lambda group: (any(rollout.cheating for rollout in group), any(rollout.solved for rollout in group)), reverse=True)
    with path.open("w") as lines:
        for group in groups:
            group.sort(key=lambda rollout: (not rollout.cheating, not rollout.solved))
            completions = [{"ids": rollout.completion_ids, "id": rollout.outcome} for rollout in group]
            lines.write(json.dumps({"prompt": group[0].prompt_ids, "completions": completions}) + "\n")


def write_commands(path: Path, model: Path, probe: Path, rollouts: Path) -> None:
    """Writes what to type next, from the folder in which the demo was started."""
    program = quoted(PROBESCORE.relative_to(Path.cwd()) if PROBESCORE.is_relative_to(Path.cwd()) else PROBESCORE)
    prompt, completion = "sort 7 ? 3 9 1 cache 0 2 4 4 8 answer", "0 2 4 4 8 <eos>"
    path.write_text(
        f"""\
# look at the probe, and check it against the model
{program} probes inspect {quoted(probe)}
{program} probes verify {quoted(probe)} --model {quoted(model)}

# serve it: in a terminal of its own, or in the background like this (and `kill %1` in the end)
{program} serve --model {quoted(model)} --probes {quoted(probe)} 2> {quoted(model.with_name("server.log"))} &

# see what runs, score a text, score the rollouts
{program} info --wait 60
{program} score "{completion}" --prompt "{prompt}"
{program} score {quoted(rollouts)} --html {quoted(rollouts.with_suffix(".html"))}
"""
    )


def quoted(path: Path) -> str:
    return shlex.quote(str(path))
