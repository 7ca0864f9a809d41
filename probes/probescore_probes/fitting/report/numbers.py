"""Converts the result of fitting a probe into JSON values; a number that is not known becomes null."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import numpy as np

from probescore_probes.fitting.results import FitResult

_NOT_NUMBERS = ("file",)


def numbers_of(result: FitResult) -> dict[str, Any]:
    """Returns all fields of a fitting result as JSON values, except for the probe file itself."""
    return {field.name: _plain(getattr(result, field.name)) for field in fields(result) if field.name not in _NOT_NUMBERS}


def _plain(value: Any) -> Any:  # noqa: ANN401 - whatever a result holds
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
