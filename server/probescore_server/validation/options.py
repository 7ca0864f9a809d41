"""Checks the options of a request (the probes, reductions and scope that the request names) against the loaded probes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

from probescore.reductions import Reduction
from probescore.types import OutputPer, ProbeInfo, Scope
from probescore_server.errors import InvalidRequest
from probescore_server.rollouts import EngineInfo, ResolvedOptions

TokenScoresWanted = Literal["all"] | Sequence[str]


def resolve_options(
    info: EngineInfo,
    *,
    probes: Sequence[str] = (),
    reductions: Sequence[Reduction | str] = (),
    token_scores: TokenScoresWanted = (),
    scope: Scope | str = Scope.COMPLETION,
    return_token_ids: bool = False,
    return_token_texts: bool = False,
) -> ResolvedOptions:
    """Checks the options of a request and returns them, with each probe's name replaced by the loaded probe's key ``name@version``.

    Args:
        info: the model and probes that are loaded.
        probes: the probes to apply, each as ``name`` or ``name@version``; empty = every loaded probe.
        reductions: the reductions from the scores of the tokens to one score, such as ``mean``; empty = each probe's default.
        token_scores: the probes whose scores per token are returned too, or ``"all"`` = every probe of the request that scores tokens.
        scope: the tokens to score: ``completion``, ``prompt`` or ``all``.
        return_token_ids: whether the response contains the token ids.
        return_token_texts: whether the response contains the text of each token.

    Raises:
        InvalidRequest: an option is invalid; the error names ``probes[i]``, ``reductions[i]``, ``token_scores.probes[i]`` or ``scope``.
    """
    by_key = {probe.key: probe for probe in info.probes}
    keys = _resolve_names(info.probes, probes, "probes") if probes else tuple(by_key)
    if not keys:
        raise InvalidRequest("probes", "no probe is loaded: the server was started without any")
    match token_scores:
        case "all":
            wanted = tuple(key for key in keys if by_key[key].output_per is OutputPer.TOKEN)
        case str():
            raise InvalidRequest("token_scores", f"{token_scores!r} is neither 'all' nor a list of probes")
        case _:
            wanted = _resolve_names(info.probes, token_scores, "token_scores.probes")
            _check_token_scores(wanted, keys, by_key)
    return ResolvedOptions(
        probes=keys,
        reductions=tuple(_parse_reduction(written, index) for index, written in enumerate(reductions)),
        token_scores=frozenset(wanted),
        scope=parse_scope(scope),
        return_token_ids=return_token_ids,
        return_token_texts=return_token_texts,
    )


def _check_token_scores(wanted: Sequence[str], requested: Sequence[str], by_key: Mapping[str, ProbeInfo]) -> None:
    known = set(requested)
    for index, key in enumerate(wanted):
        if key not in known:
            raise InvalidRequest(f"token_scores.probes[{index}]", f"{key} is not among the probes of this request")
        if by_key[key].output_per is not OutputPer.TOKEN:
            raise InvalidRequest(f"token_scores.probes[{index}]", f"{key} pools by itself and has no scores per token")


def _resolve_names(loaded: Sequence[ProbeInfo], names: Sequence[str], path: str) -> tuple[str, ...]:
    known_as: dict[str, list[str]] = defaultdict(list)
    for probe in loaded:
        for name in (probe.name, probe.key):
            known_as[name].append(probe.key)
    keys: dict[str, None] = {}
    for index, name in enumerate(names):
        matches = known_as.get(name)
        if not matches:
            known = ", ".join(probe.key for probe in loaded) or "none"
            raise InvalidRequest(f"{path}[{index}]", f"unknown probe {name[:100]!r}; loaded: {known}", "UNKNOWN_PROBE")
        if len(matches) > 1:
            raise InvalidRequest(f"{path}[{index}]", f"{name!r} is loaded in several versions; name one of {', '.join(matches)}")
        if matches[0] in keys:
            raise InvalidRequest(f"{path}[{index}]", f"{matches[0]} appears twice")
        keys[matches[0]] = None
    return tuple(keys)


def _parse_reduction(written: Reduction | str, index: int) -> Reduction:
    try:
        return Reduction.parse(written)
    except ValueError as error:
        raise InvalidRequest(f"reductions[{index}]", str(error)) from None


def parse_scope(scope: Scope | str) -> Scope:
    """Returns the scope (the tokens to score: completion, prompt or all) that a name stands for.

    Raises:
        InvalidRequest: no scope has this name; the error names ``scope``.
    """
    try:
        return Scope(scope)
    except ValueError:
        raise InvalidRequest("scope", f"{scope!r} is none of {', '.join(known.value for known in Scope)}") from None
