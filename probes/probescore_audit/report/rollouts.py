"""Chooses the rollouts of a training run that say most about a probe, and shows them with their tokens coloured by score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from probescore_audit.record import RolloutRow
from probescore_audit.record_audit import ReadingAudit
from probescore_audit.report.words import escaped

_EACH = 4
_LONGEST_PROMPT, _MOST_TOKENS = 600, 600


def informative_rollouts(each: ReadingAudit) -> Iterator[tuple[str, list[RolloutRow]]]:
    """Yields kinds of rollouts of the last window of training steps that say most about a probe, each with a title and a few rollouts:
    those that the probe misses, those that it flags wrongly, and those that are to be labelled.
    """
    recorded, audit = each.recorded, each.audit
    first = audit.windows[-1].first_step if audit.windows else 0
    labels, run = recorded.labels, recorded.run
    recent = run.step[labels.rollout] >= first
    flagged = run.flagged[labels.rollout]
    for title, chosen, lowest_first in (
        ("With the behaviour, and not flagged", recent & labels.positive & ~flagged, True),
        ("Flagged, and without the behaviour", recent & ~labels.positive & flagged, False),
    ):
        places = labels.rollout[chosen]
        order = places[np.argsort(run.scores[places], kind="stable")]
        first_of_prompt: dict[tuple[int, str], RolloutRow] = {}
        for index in order if lowest_first else order[::-1]:
            row = recorded.rollouts[index]
            first_of_prompt.setdefault((row.step, row.prompt), row)
        shown = list(first_of_prompt.values())[:_EACH]
        if shown:
            yield f"{title} ({len(shown)} of {len(places)} labelled, from step {first} on, of different prompts)", shown
    if each.further:
        wanted = {(planned.step, planned.rollout) for planned in each.further}
        to_label = np.array([index for index, row in enumerate(recorded.rollouts) if (row.step, row.rollout) in wanted], np.int64)
        nearest = to_label[np.argsort(np.abs(run.scores[to_label] - run.threshold), kind="stable")][:_EACH]
        yield f"To be labelled ({len(each.further)}), those nearest to the threshold", [recorded.rollouts[index] for index in nearest]


def shown_rollout(row: RolloutRow, each: ReadingAudit) -> str:
    """Returns a rollout as HTML: its place in the run, its scores under every reading, and its text if the record has it."""
    recorded = each.recorded
    scores = ", ".join(
        f"{escaped(reading)} {reductions[recorded.reduction]:.3g}"
        for reading, reductions in row.scores.get(recorded.probe, {}).items()
        if recorded.reduction in reductions
    )
    prompt = "" if row.prompt_text is None else f'<div class="prompt">{escaped(_cut(row.prompt_text))}</div>'
    return (
        f'<div class="rollout"><div class="note">step {row.step}, rollout {escaped(row.rollout)} of prompt {escaped(row.prompt)}: {scores}'
        f"</div>{prompt}{_completion(row, recorded.probe, recorded.reading, recorded.run.threshold)}</div>"
    )


def _completion(row: RolloutRow, probe: str, reading: str, threshold: float) -> str:
    scores = None if row.token_scores is None else row.token_scores.get(probe, {}).get(reading)
    pieces = row.completion_pieces
    if pieces is not None and scores is not None and len(pieces) == len(scores):
        return f'<div class="text">{_coloured(pieces[:_MOST_TOKENS], scores[:_MOST_TOKENS], threshold)}</div>'
    if row.completion_text is not None:
        return f'<div class="text">{escaped(row.completion_text[: 6 * _MOST_TOKENS])}</div>'
    return ""


def _coloured(pieces: Sequence[str], scores: Sequence[float], threshold: float) -> str:
    away = np.asarray(scores, np.float64) - threshold
    reach = float(np.abs(away).max()) or 1.0
    return "".join(
        f'<span class="{"above" if strength >= 0 else "below"}" style="--s:{abs(strength):.2f}" title="{score:.3g}">{escaped(piece)}</span>'
        for piece, score, strength in zip(pieces, scores, (away / reach).tolist(), strict=True)
    )


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_PROMPT else "… " + text[-_LONGEST_PROMPT:]
