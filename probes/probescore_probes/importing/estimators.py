"""Reads estimators and pipelines of scikit-learn, saved by ``joblib``, ``pickle`` or ``skops``.

A file of ``joblib`` or ``pickle`` can run code when it is opened; a file of ``skops`` cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from probescore_probes import arguments
from probescore_probes.exporting import sklearn_probe
from probescore_probes.importing.imported import NONLINEAR, Imported, ImportOptions, is_affine, named
from probescore_probes.importing.pickles import unpickled
from probescore_probes.importing.source import ProbeSource

_SKOPS = "save the estimator with skops.io.dump, which runs nothing"


def is_estimator(source: ProbeSource) -> bool:
    """Returns whether a file is a pickle, or was written by ``skops``, as saved estimators of scikit-learn are."""
    return source.kind == "skops" or (source.kind == "pickle" and source.path.suffix != ".lgprobe")


def read_estimator(source: ProbeSource, asked: ImportOptions) -> Imported:
    """Reads a fitted estimator or pipeline of scikit-learn from a file.

    Raises:
        ValueError: the file would run code and is not trusted, holds no estimator, or holds one that cannot be exported to ONNX.
    """
    content, warned = (_from_skops(source), ()) if source.kind == "skops" else unpickled(source, asked.trust_pickle, _SKOPS)
    if not hasattr(content, "fit"):
        raise ValueError(f"{source.name}: {arguments.kind_of(content)}; give one fitted estimator or pipeline of scikit-learn")
    return estimator_probe(content, asked, source, warned)


def estimator_probe(estimator: Any, asked: ImportOptions, source: ProbeSource, warned: tuple[str, ...] = ()) -> Imported:  # noqa: ANN401
    """Makes a probe of a fitted estimator of scikit-learn, exported to ONNX.

    Raises:
        ValueError: the estimator cannot be exported to ONNX, or its number of features fits no number of taps (places in the model).
    """
    function = sklearn_probe(estimator)
    if function.width is None:
        raise ValueError(f"{source.name}: {type(estimator).__name__} does not say how many features it was fitted on; fit it again")
    columns = function.columns or 1
    notes = warned if is_affine(function, function.width) else (*warned, NONLINEAR)
    classes = function.classes[-columns:] if columns > 1 else ()
    return Imported(
        function,
        asked.taps_for(function.width),
        f"{type(estimator).__name__} of scikit-learn",
        named(asked, columns, classes),
        notes=notes,
    )


def _from_skops(source: ProbeSource) -> object:
    try:
        import skops.io
    except ModuleNotFoundError:
        raise ValueError(f"{source.name}: a file of skops, which is not installed; pip install skops") from None
    load: Callable[..., object] = skops.io.load
    try:
        unknown = skops.io.get_untrusted_types(file=source.path)
        if not unknown:
            return load(source.path, trusted=[])
    except Exception as error:  # of a damaged file, or of another version
        raise ValueError(f"{source.name}: skops cannot read it ({type(error).__name__}); save it again") from error
    raise ValueError(
        f"{source.name}: holds {', '.join(unknown[:5])}, which skops does not know to be safe; save scikit-learn's own parts alone"
    )
