"""Makes a ``ProbeScorer``, which turns probe scores into changes of rewards, from text settings: environment variables, or fields of YAML
files and keyword arguments.

Trainers that load a function by its path pass no settings to the function. Environment variables reach the function, and every worker
process of the run.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Union

from probescore_adapters.errors import SignalError
from probescore_adapters.guard_rails import GuardRails
from probescore_adapters.record_options import RecordOptions
from probescore_adapters.scorer import Policy, ProbeScorer
from probescore_adapters.signals import ProbeSignal

ADDRESS = "PROBESCORE_ADDRESS"
SIGNALS = "PROBESCORE_SIGNALS"
RAILS = "PROBESCORE_RAILS"
RUN_ID = "PROBESCORE_RUN_ID"
TOKENIZER_FINGERPRINT = "PROBESCORE_TOKENIZER_FINGERPRINT"
FOLLOW = "PROBESCORE_FOLLOW"
RECORD = "PROBESCORE_RECORD"
POLICY_ENV = {field.name: f"PROBESCORE_{field.name.upper()}" for field in fields(Policy)}
"""Dictionary from the names of ``Policy``'s fields to their environment variables, such as ``PROBESCORE_ON_FAILURE``."""

_NUMBERS = ("weight", "threshold")
_LATE_STEPS = 4


def scorer_from_environment(environment: Mapping[str, str] = os.environ) -> ProbeScorer:
    """Returns a ``ProbeScorer``, which turns probe scores into changes of rewards, configured by environment variables.

    ``PROBESCORE_SIGNALS`` is required: a JSON list of objects with the fields of ``ProbeSignal`` (a rule from probe scores to rewards), a
    single object of this kind, or the path of a JSON file that contains the list or the object. ``PROBESCORE_ADDRESS``: the address of the
    server, or several addresses separated by commas. ``PROBESCORE_ON_FAILURE``, ``PROBESCORE_ON_UNSCORABLE``, ``PROBESCORE_TIMEOUT``,
    ``PROBESCORE_WAIT_SECONDS``: the fields of ``Policy``. ``PROBESCORE_RAILS``: a JSON object with fields of ``GuardRails``.
    ``PROBESCORE_RUN_ID``, ``PROBESCORE_TOKENIZER_FINGERPRINT``, ``PROBESCORE_FOLLOW`` (``true`` or ``false``): the arguments of
    ``ProbeScorer`` with these names; ``ProbeScorer`` also reads ``PROBESCORE_JOB``. ``PROBESCORE_RECORD``: the folder of the run's record,
    or a JSON object as ``record_from`` takes it. An empty variable counts as not set.

    Raises:
        ValueError: a variable is missing or wrong; the error names the variable, the field and the given value. For a wrong signal the
            error is a ``SignalError``.
    """
    given = {variable: value.strip() for variable, value in environment.items() if variable.startswith("PROBESCORE_") and value.strip()}
    if SIGNALS not in given:
        raise ValueError(f'{SIGNALS}: required, such as \'[{{"probe": "cheating", "mode": "penalty"}}]\', or the path of a JSON file')
    options: dict[str, Any] = {"policy": _policy(given), "follow": _switch(FOLLOW, given.get(FOLLOW, "false"))}
    if RAILS in given:
        options["rails"] = rails_from(_json(RAILS, given[RAILS]), RAILS)
    if RECORD in given:
        is_object = given[RECORD].startswith("{")
        options["record"] = record_from(_json(RECORD, given[RECORD]) if is_object else given[RECORD], RECORD)
    if ADDRESS in given:
        addresses = [address.strip() for address in given[ADDRESS].split(",") if address.strip()]
        options["address"] = addresses if len(addresses) > 1 else addresses[0]
    signals = signals_from(_json(SIGNALS, given[SIGNALS]), SIGNALS)
    try:
        return ProbeScorer(signals, run_id=given.get(RUN_ID, ""), tokenizer_fingerprint=given.get(TOKENIZER_FINGERPRINT, ""), **options)
    except SignalError as error:
        raise SignalError(f"{SIGNALS}.{error.field}", error.problem) from None
    except ValueError as error:
        if str(error).startswith("record:"):
            raise ValueError(f"{RECORD}{str(error).removeprefix('record')}") from None
        raise ValueError(f"{ADDRESS}: {error}, got {given.get(ADDRESS)!r}") from None


def record_from(given: str | Mapping[str, Any], where: str = "record") -> RecordOptions:
    """Makes ``RecordOptions`` (what is written into the record of a training run) from a folder, or from a dictionary of fields.

    Trainers that are configured by text have rollouts scored one at a time: rollouts may come up to 4 steps late, and the labels of a step
    are given when the next one begins, unless ``late_steps`` and ``batches_per_step`` say otherwise.

    Raises:
        ValueError: a field is unknown, missing or wrong; the error names the field.
    """
    chosen = {"directory": given} if isinstance(given, str) else {"directory": "", **_of_settings(RecordOptions, given, where)}
    for name in ("redact", "checker"):
        if isinstance(chosen.get(name), str):
            chosen[name] = _imported(chosen[name], f"{where}.{name}")
    try:
        return RecordOptions(**{"late_steps": _LATE_STEPS, "batches_per_step": 0, **chosen})
    except ValueError as error:
        raise ValueError(f"{where}{str(error).removeprefix('record')}") from None


def _of_settings(kind: type[RecordOptions], given: object, where: str) -> dict[str, Any]:
    try:
        return _known(kind, given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _imported(written: str, where: str) -> Any:  # noqa: ANN401 - whatever is named
    """Returns the function that ``module:function`` names."""
    module, _, function = written.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(f"{where}: expected module:function that can be imported, got {written!r}: {error}") from error


def signals_from(given: Mapping[str, Any] | Sequence[Mapping[str, Any]], where: str = "signals") -> tuple[ProbeSignal, ...]:
    """Makes signals (rules from probe scores to rewards) from a list of objects with the fields of ``ProbeSignal``, or from a single
    object.

    Args:
        given: the objects, as parsed from JSON, YAML or keyword arguments.
        where: source of the objects, for error messages.

    Raises:
        SignalError: a field is unknown, missing or wrong; the error's ``field`` names signal and field, such as ``signals[1].weight``.
    """
    entries = [given] if isinstance(given, Mapping) else given
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise SignalError(where, f"expected a list of objects, got {given!r}")
    signals = []
    for index, entry in enumerate(entries):
        place = f"{where}[{index}]"
        try:
            chosen = _known(ProbeSignal, entry)
            for name, value in chosen.items():
                if name not in _NUMBERS and not (isinstance(value, str) or callable(value)):
                    raise SignalError(name, f"expected a string, got {value!r}")
            signals.append(ProbeSignal(**{"probe": "", **chosen}))
        except SignalError as error:
            raise SignalError(f"{place}.{error.field}", error.problem) from None
        except ValueError as error:
            raise SignalError(place, str(error)) from None
    return tuple(signals)


def rails_from(given: Mapping[str, Any], where: str = "rails") -> GuardRails:
    """Makes ``GuardRails`` (limits on the effect of probe scores on rewards) from a dictionary of fields; fields that are not given keep
    their defaults.

    Raises:
        ValueError: a field is unknown or wrong; the error names the field.
    """
    try:
        chosen = _known(GuardRails, given)
        for name, value in chosen.items():
            is_switch = isinstance(getattr(GuardRails, name), bool)
            if isinstance(value, bool) != is_switch or not isinstance(value, (int, float)):
                raise ValueError(f"{name}: expected {'true or false' if is_switch else 'a number'}, got {value!r}")
        return GuardRails(**chosen)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _known(kind: type[Union[ProbeSignal, GuardRails, RecordOptions]], given: object) -> dict[str, Any]:
    """Returns those of the given settings that are not null, as a dictionary, after a check that their names are fields of a class.

    Raises:
        ValueError: a name is not a field of the class.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"expected an object, got {given!r}")
    known = [field.name for field in fields(kind)]
    for name in given:
        if name not in known:
            raise ValueError(f"{name}: there is no such field; there are {', '.join(known)}")
    return {name: value for name, value in given.items() if value is not None}


def _policy(given: Mapping[str, str]) -> Policy:
    chosen: dict[str, Any] = {}
    for field, variable in POLICY_ENV.items():
        if variable in given:
            try:
                chosen[field] = float(given[variable])
            except ValueError:
                chosen[field] = given[variable]
    try:
        return Policy(**chosen)
    except ValueError as error:
        # the message begins with the field
        field, _, problem = str(error).partition(":")
        raise ValueError(f"{POLICY_ENV[field]}:{problem}") from None


def _switch(variable: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ValueError(f"{variable}: expected true or false, got {value!r}")
    return value.lower() == "true"


def _json(variable: str, value: str) -> Any:  # noqa: ANN401
    text = value
    if value[0] not in "[{":
        try:
            text = Path(value).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ValueError(f"{variable}: neither JSON nor a file that can be read ({reason}): {value!r}") from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{variable}: not JSON: {error}: {text[:200]!r}") from None
