"""Prints scored rollouts on a terminal: tokens on a background colour that shows their score, or plain text on one without colours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.style import Style
from rich.text import Text

from probescore_server.cli.report.views import ColourScale, RolloutView, Series, SeriesScores, ShownToken, colour_scales

# One lightness throughout: white text stays readable, and strength shows as saturation on light and on dark terminals alike.
_NEUTRAL, _BELOW, _ABOVE = (118, 118, 124), (24, 98, 200), (204, 58, 12)
_FAINTEST = 0.12
_CONTEXT_TOKENS = 200


def has_colours(console: Console) -> bool:
    """Returns whether a console shows colours: false for pipes, files and terminals without colours, and if the environment variable
    NO_COLOR is set.
    """
    return console.color_system is not None and not console.no_color


def print_rollouts(console: Console, views: Sequence[RolloutView], series: Sequence[Series]) -> None:
    """Prints rollouts one after the other, each with its scores for every label of every probe, on every reading, and then a legend of the
    colours.
    """
    printer = RolloutPrinter(console, series)
    for view in views:
        printer.print(view, scale_of=views)
    printer.print_legend()


class RolloutPrinter:
    """Printer of scored rollouts on a terminal, as their scores arrive. Each rollout is printed once for every series (label of a probe);
    the prompt of a group is printed once.

    Args:
        console: console to print on.
        series: the series to print for each rollout.
    """

    def __init__(self, console: Console, series: Sequence[Series]) -> None:
        self._console = console
        self._series = series
        self._colours = has_colours(console)
        self._scales: dict[str, ColourScale] = {}
        self._context: tuple[ShownToken, ...] = ()

    def print(self, view: RolloutView, scale_of: Sequence[RolloutView]) -> None:
        """Prints one scored rollout.

        Args:
            view: the rollout.
            scale_of: the rollouts that have arrived when the first one is printed. They determine the colour scale, which is then kept, so
                that a colour always means one score.
        """
        if not self._scales:
            self._scales = colour_scales(self._series, scale_of)
        console = self._console
        title = Text().append(view.title, "bold").append(f"  label {view.label}" if view.label else "")
        console.print(title.append("  ids from text" if view.inexact else "", "dim"), soft_wrap=True)
        if view.problem:
            console.print(Text(f"  not scored: {view.problem}", "red"))
        for reading, problem in view.unscored.items() if not view.problem else ():
            console.print(Text(f"  not scored on {reading}: {problem}", "red"))
        if view.context and view.context != self._context:
            console.print(_context(view.context), soft_wrap=True)
            self._context = view.context
        for entry in self._series:
            scores = view.scores.get(entry.name)
            if scores is None:
                continue
            console.print(_summary(entry, scores), soft_wrap=True)
            if scores.tokens is not None:
                console.print(_tokens(view.tokens, scores.tokens.tolist(), self._scales[entry.name], self._colours), soft_wrap=True)
        console.print()

    def print_legend(self) -> None:
        """Prints the meaning of the colours of tokens, if the terminal shows colours and a rollout was printed."""
        for entry in self._series if self._colours and self._scales else ():
            self._console.print(_legend(entry, self._scales[entry.name]))


def _context(tokens: Sequence[ShownToken]) -> Text:
    left_out = len(tokens) - _CONTEXT_TOKENS
    start = f"… {left_out} tokens … " if left_out > 0 else ""
    return Text(start + "".join(token.text for token in tokens[-_CONTEXT_TOKENS:]), "dim")


def _summary(series: Series, scores: SeriesScores) -> Text:
    """Returns a line with a rollout's scores for one label of a probe, such as the mean over its tokens and over each span (named range of
    tokens), and whether the first of these scores reaches the probe's threshold.
    """
    summary = Text(f"{series.name}  ")
    for span, numbers in scores.reduced.items():
        summary.append(f"{span}: " if span else "", "dim")
        for reduction, number in zip(series.reductions or ("score",), numbers, strict=True):
            summary.append(f"{reduction} ", "dim").append(
                f"{'absent' if number is None else f'{number:+.3f}' if series.base else f'{number:.3f}'}  ", "bold"
            )
    if series.calibration is not None and scores.flagged is not None:
        summary.append("● flagged" if scores.flagged else "○ not flagged", _style(1.0) if scores.flagged else "")
        summary.append(f"  threshold {series.calibration.threshold:.3f}", "dim")
        if scores.outside:
            summary.append(f"  not found on such rollouts: {', '.join(scores.outside)}", "yellow")
    return summary


def _tokens(tokens: Sequence[ShownToken], scores: Sequence[float], scale: ColourScale, colours: bool) -> Text:
    drawn = Text()
    for token, score in zip(tokens, scores, strict=True):
        if not colours:
            drawn.append(f"{token.text}[{score:.2f}{'' if token.counts else ' masked'}]")
        elif not token.counts:
            drawn.append(token.text, "dim strike")
        else:
            drawn.append(token.text, _style(scale.position(score)))
    return drawn


def _style(position: float) -> Style:
    strength = abs(position)
    if strength < _FAINTEST:
        return Style.null()
    end = _ABOVE if position > 0 else _BELOW
    red, green, blue = (round(neutral + strength * (channel - neutral)) for neutral, channel in zip(_NEUTRAL, end, strict=True))
    return Style(color="#ffffff", bgcolor=f"rgb({red},{green},{blue})")


def _legend(series: Series, scale: ColourScale) -> Text:
    legend = Text().append(f"{series.name} ({series.unit.value})  ", "dim")
    for step in _steps():
        legend.append(f" {scale.centre + step * scale.reach:.2f} ", _style(step))
    if series.calibration is None:
        return legend
    rate = series.calibration
    return legend.append(
        f"  centre = threshold at {rate.false_positive_rate:.0%} false positives "
        f"({rate.false_positive_rate_low:.1%} to {rate.false_positive_rate_high:.1%}, {rate.negatives} negatives)",
        "dim",
    )


def _steps() -> Iterator[float]:
    yield from (-1.0, -0.5, 0.0, 0.5, 1.0)
