"""Pickles, which run code as they are opened: refused with what they would run, unless whoever asks trusts them."""

from __future__ import annotations

import pickletools
import warnings

import structlog

from probescore_probes.importing.source import ProbeSource

_SHOWN = 6

logger = structlog.get_logger(__name__)


def unpickled(source: ProbeSource, trusted: bool, instead: str) -> tuple[object, tuple[str, ...]]:
    """Opens a pickle, and returns what it holds with notes: that its code ran, and what its libraries warn of.

    Args:
        source: the file; what ``joblib`` or ``dill`` wrote too.
        trusted: whether its code may run, here and now.
        instead: what to do without.

    Raises:
        ValueError: it is not trusted, or cannot be opened.
    """
    names = pickled_names(source)
    if not trusted:
        runs = f": it names {', '.join(names[:_SHOWN])}{' and others' if len(names) > _SHOWN else ''}" if names else ""
        raise ValueError(
            f"{source.name}: a Python pickle, which runs code as it is opened{runs}; {instead}, or, if you trust whoever made it, give "
            "trust_pickle (--trust-pickle)"
        )
    import joblib  # comes with scikit-learn

    logger.warning("a pickle is opened, and its code run", file=source.name, names=names)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            content = joblib.load(source.path)
    except ModuleNotFoundError as error:
        raise ValueError(f"{source.name}: its pickle needs {error.name}, which is not installed here; install it, or {instead}") from None
    except Exception as error:  # whatever the pickle's own code raises
        raise ValueError(f"{source.name}: cannot be opened ({type(error).__name__}); {instead}") from error
    ran = f"Read from a pickle, whose code was run: {', '.join(names[:_SHOWN]) or 'compressed'}"
    return content, (ran, *(" ".join(str(warning.message).split()) for warning in caught))


def pickled_names(source: ProbeSource) -> list[str]:
    """Lists what an uncompressed pickle would import, as far as it can be read without being run."""
    names: list[str] = []
    strings: list[str] = []
    memo: dict[int, str] = {}
    try:
        with source.path.open("rb") as file:
            for operation, argument, _ in pickletools.genops(file):
                if operation.name == "GLOBAL":
                    names.append(str(argument).replace(" ", "."))
                elif operation.name == "STACK_GLOBAL":
                    names.append(".".join(strings[-2:]))
                elif operation.name == "MEMOIZE":
                    memo[len(memo)] = strings[-1] if strings else ""
                elif operation.name in ("BINGET", "LONG_BINGET"):
                    strings.append(memo.get(int(argument or 0), ""))
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # joblib puts the bytes of arrays between operations, which are none
        return list(dict.fromkeys(names))
    return list(dict.fromkeys(names))
