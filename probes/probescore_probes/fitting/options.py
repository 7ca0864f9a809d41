"""Defines the options of fitting a probe, and checks them before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from probescore_probes.fitting.kinds import KINDS
from probescore_probes.fitting.linear_kinds import LOGISTIC
from probescore_probes.fitting.sparse_features import SAE_FEATURE
from probescore_probes.writing_arguments import check_names
from probescore_server.probes.format.probe_file import read_probe_file

POOLS = ("mean", "last")
EVERY_BLOCK = ("resid_post.*",)


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Options of fitting a probe.

    Attributes:
        kind: one of ``KINDS``.
        taps: names of taps (places in the model), or patterns of names.
        pools: names of the poolings to try: ``mean``, ``last``.
        autoencoder: the folder of a sparse autoencoder of SAELens, for the kind ``sae-feature``, which reads its tap alone.
        feature: index of the autoencoder's feature; ``None`` = the one that tells the labels best.
        false_positive_rate: false-positive rate that the threshold is set for.
        dtype, device, revision, trust_remote_code: how the model is loaded and run.
        name, version, label, description: entries of the probe file.
        other_dtype: a second dtype in which the probe is served and compared; empty = none.
        seed: seed of splits, folds and the bootstrap.
    """

    name: str
    version: str = "1"
    label: str = "positive"
    description: str = ""
    kind: str = LOGISTIC
    taps: tuple[str, ...] = EVERY_BLOCK
    pools: tuple[str, ...] = POOLS
    autoencoder: Path | None = None
    feature: int | None = None
    false_positive_rate: float = 0.05
    dtype: str = "float32"
    device: str = "cpu"
    revision: str = ""
    trust_remote_code: bool = False
    other_dtype: str = "bfloat16"
    seed: int = 0


def check_options(options: FitOptions, output: Path) -> None:
    """Checks options, and that the probe file can be written to its path.

    Raises:
        TypeError: a name is no text.
        ValueError: an option is not one of those that there are, or the file at ``output`` has the same name and version.
        ProbeRefused: the file at ``output`` is no probe file.
    """
    check_names(options.name, options.version, label=options.label, description=options.description)
    if options.kind not in KINDS:
        raise ValueError(f"kind: {options.kind!r}; give one of {', '.join(KINDS)}")
    _check_autoencoder(options)
    if not options.pools:
        raise ValueError(f"pool: none given; give {' or '.join(POOLS)}, or both")
    for pool in options.pools:
        if pool not in POOLS:
            raise ValueError(f"pool: {pool!r}; give {' or '.join(POOLS)}")
    if not options.taps:
        raise ValueError("taps: none given; give names or patterns, such as resid_post.*")
    if options.seed < 0:
        raise ValueError(f"seed: {options.seed}; give 0 or a whole number above it")
    if not 0 < options.false_positive_rate < 1:
        raise ValueError(f"false_positive_rate: {options.false_positive_rate:g}; give a number between 0 and 1, such as 0.05")
    if not output.parent.is_dir():
        raise ValueError(f"output: there is no directory {str(output.parent)!r}; make it first")
    if output.exists():
        there = read_probe_file(output).manifest  # anything else is refused
        if (there.name, there.version) == (options.name, options.version):
            raise ValueError(
                f"output: {str(output)!r} holds {there.key} already, and a version never changes; give another version (--probe-version), "
                "or delete the file"
            )


def _check_autoencoder(options: FitOptions) -> None:
    if options.kind != SAE_FEATURE:
        if options.autoencoder is not None or options.feature is not None:
            given = "sae" if options.autoencoder is not None else "feature"
            raise ValueError(f"{given}: for the kind {SAE_FEATURE} alone, and the kind is {options.kind}; leave it out, or give that kind")
    elif options.autoencoder is None:
        raise ValueError(f"sae: none given; the kind {SAE_FEATURE} takes a folder of SAELens, with cfg.json and sae_weights.safetensors")
    elif options.taps != EVERY_BLOCK:
        raise ValueError(f"taps: {', '.join(options.taps)}; {SAE_FEATURE} reads where its autoencoder was trained: leave them out")
