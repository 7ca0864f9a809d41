"""Checks the options of a request (the probes, reductions and scope that the request names) against the loaded probes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from probescore.reductions import Reduction
from probescore.types import FROZEN, OutputPer, ProbeInfo, Scope, version_order
from probescore.types.readings import name_problem
from probescore_server.errors import InvalidRequest
from probescore_server.rollouts import EngineInfo, ResolvedOptions

TokenScoresWanted = Literal["all"] | Sequence[str]

_STEPS = 1 << 63


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
        probes: the probes to apply. ``name@version`` means exactly that version; ``name`` means the highest version of the name that is not
            retired (served only to requests that name this version), by ``version_order``; empty = the highest such version of each name.
        reductions: the reductions from the scores of the tokens to one score, such as ``mean``; empty = each probe's default.
        token_scores: the probes whose scores per token are returned too, or ``"all"`` = every probe of the request that scores tokens.
        scope: the tokens to score: ``completion``, ``prompt`` or ``all``.
        return_token_ids: whether the response contains the token ids.
        return_token_texts: whether the response contains the text of each token.

    Raises:
        InvalidRequest: an option is invalid; the error names ``probes[i]``, ``reductions[i]``, ``token_scores.probes[i]`` or ``scope``.
    """
    by_key = {probe.key: probe for probe in info.probes}
    highest = highest_versions(probe for probe in info.probes if probe.key not in info.retired)
    keys = _resolve_names(info, probes, highest, "probes") if probes else tuple(highest.values())
    if not keys:
        raise InvalidRequest("probes", "no probe is loaded: the server was started without any" if not by_key else _only_retired(info))
    match token_scores:
        case "all":
            wanted = tuple(key for key in keys if by_key[key].output_per is OutputPer.TOKEN)
        case str():
            raise InvalidRequest("token_scores", f"{token_scores!r} is neither 'all' nor a list of probes")
        case _:
            # here a bare name means the version that this request applies
            applied = highest | highest_versions(by_key[key] for key in keys)
            wanted = _resolve_names(info, token_scores, applied, "token_scores.probes")
            _check_token_scores(wanted, keys, by_key)
    adapters = frozenset(info.adapters.get(key, "") for key in keys)
    return ResolvedOptions(
        probes=keys,
        reductions=tuple(_parse_reduction(written, index) for index, written in enumerate(reductions)),
        token_scores=frozenset(wanted),
        scope=parse_scope(scope),
        return_token_ids=return_token_ids,
        return_token_texts=return_token_texts,
        adapters=adapters if any(adapters) else frozenset(),
    )


def check_reading_name(name: object, step: object) -> None:
    """Checks the name under which a reading is to be loaded, and the training step that labels it.

    Args:
        name: the name.
        step: the training step; ``None`` = none.

    Raises:
        InvalidRequest: the error names ``name`` or ``step``.
    """
    if name == FROZEN:
        raise InvalidRequest("name", f"the name of a reading is not {FROZEN!r}, which means the frozen model itself: give it another")
    if problem := name_problem(name):
        raise InvalidRequest("name", problem)
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < _STEPS):
        raise InvalidRequest("step", f"{step!r} is no training step: a whole number from 0")


def check_readings_of_probes(info: EngineInfo, probes: Sequence[str], readings: Sequence[str]) -> None:
    """Checks that each probe of a request can be read on each reading of the request: a probe that brings an adapter is read with it on the
    frozen model, and on nothing else.

    Args:
        info: the model and probes that are loaded.
        probes: the probes of the request, as ``name@version``.
        readings: the names of the readings that the request asks for; empty = the frozen one.

    Raises:
        InvalidRequest: naming ``readings[i]`` and the probe.
    """
    beside = next((index for index, name in enumerate(readings) if name != FROZEN), None)
    if beside is None or isinstance(readings, str):
        return
    own = next((key for key in probes if key in info.adapters), None)
    if own is not None:
        problem = (
            f"{readings[beside][:100]!r} is not read with {own}, which brings an adapter of its own, so that it reads {FROZEN!r} alone"
        )
        raise InvalidRequest(f"readings[{beside}]", f"{problem}: name other probes, or ask for {FROZEN!r}")


def _check_token_scores(wanted: Sequence[str], requested: Sequence[str], by_key: Mapping[str, ProbeInfo]) -> None:
    known = set(requested)
    for index, key in enumerate(wanted):
        if key not in known:
            raise InvalidRequest(f"token_scores.probes[{index}]", f"{key} is not among the probes of this request")
        if by_key[key].output_per is not OutputPer.TOKEN:
            raise InvalidRequest(f"token_scores.probes[{index}]", f"{key} pools by itself and has no scores per token")


def highest_versions(probes: Iterable[ProbeInfo]) -> dict[str, str]:
    """Returns a dictionary from each probe's name to the key ``name@version`` of the name's highest version; names keep their order."""
    highest: dict[str, ProbeInfo] = {}
    for probe in probes:
        best = highest.setdefault(probe.name, probe)
        if version_order(probe.version) > version_order(best.version):
            highest[probe.name] = probe
    return {name: probe.key for name, probe in highest.items()}


def _resolve_names(info: EngineInfo, names: Sequence[str], highest: Mapping[str, str], path: str) -> tuple[str, ...]:
    """Returns the key ``name@version`` of each probe that a request names; a name without a version means the key that ``highest`` has for
    the name.
    """
    known = {**highest, **{probe.key: probe.key for probe in info.probes}}
    keys: dict[str, None] = {}
    for index, name in enumerate(names):
        key = known.get(name)
        if key is None:
            raise InvalidRequest(f"{path}[{index}]", _unknown(info, name), "UNKNOWN_PROBE")
        if key in keys:
            raise InvalidRequest(f"{path}[{index}]", f"{key} appears twice")
        keys[key] = None
    return tuple(keys)


def _unknown(info: EngineInfo, name: str) -> str:
    retired = [probe.key for probe in info.probes if probe.name == name]
    if retired:
        return f"{name!r} has no current version; its retired ones are served for a while as {', '.join(retired)}"
    loaded = ", ".join(probe.key for probe in info.probes if probe.key not in info.retired) or "none"
    return f"unknown probe {name[:100]!r}; loaded: {loaded}"


def _only_retired(info: EngineInfo) -> str:
    return f"no probe is current; retired ones are served for a while as {', '.join(probe.key for probe in info.probes)}"


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
