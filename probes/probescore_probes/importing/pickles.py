"""Opens pickles, which can run code while they are opened, only if the importer trusts them.

An untrusted pickle is refused with a message that lists the code which the pickle would run.
"""

from __future__ import annotations

import pickletools
import warnings

import structlog

from probescore_probes.importing.source import ProbeSource

_SHOWN = 6

logger = structlog.get_logger(__name__)


def unpickled(source: ProbeSource, trusted: bool, instead: str) -> tuple[object, tuple[str, ...]]:
    """Opens a pickle and returns the object in it, with notes for the manifest: that its code ran, and warnings of the libraries it used.

    Args:
        source: the file, written by ``pickle``, ``joblib`` or ``dill``.
        trusted: whether the pickle's code may run in this process.
        instead: advice for the message on what to do without trusting the file.

    Raises:
        ValueError: the pickle is not trusted, or cannot be opened.
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
    """Lists the names that an uncompressed pickle would import, as far as the pickle can be parsed without running it."""
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
