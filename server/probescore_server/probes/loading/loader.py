"""Makes checked probe files ready to run on a language model's activations.

As many probes as possible are combined into stacks, sets of probes that are computed together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import onnx
import structlog
import torch
from numpy.typing import NDArray

from probescore.types import OutputPer, ScoreUnit, Tap
from probescore_server.errors import ProbeRefused
from probescore_server.probes.format.graph import CU_SEQLENS, POSITIONS, GraphInputs, GraphSignature
from probescore_server.probes.format.manifest import Manifest
from probescore_server.probes.format.probe_file import ProbeFile
from probescore_server.probes.loading.context_check import LARGEST_CALL, rows_tried
from probescore_server.probes.loading.onnx_session import ProbeSession, session_device
from probescore_server.probes.loading.random_sequences import RandomSequences
from probescore_server.probes.loading.row_by_row import is_row_by_row
from probescore_server.probes.stacking.graph_reader import read_network
from probescore_server.probes.stacking.layered_network import Network
from probescore_server.probes.stacking.stack import Stack, stack_networks

STACKED_TOLERANCE = 1e-5
"""Limits the difference between a probe's scores in a stack and those of its own graph, in standard deviations of the scores."""

_CHECKED_ROWS = 64
_CHECKED_SCALES = (1.0, 30.0)

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class StackMember:
    """Reference to the network of one probe in a stack, by the network's number; a stack is a set of probes that are computed together."""

    stack: Stack
    number: int


@dataclass(frozen=True, eq=False)
class LoadedProbe:
    """Value object with a probe that is ready to run.

    Attributes:
        manifest: the probe's manifest (its metadata).
        runs: the onnxruntime session of the probe's own graph, or the network in a stack (a set of probes computed together), that computes
            the probe's scores.
        as_probability: whether a sigmoid is applied to the scores before they are reduced and sent.
        rows_per_call: the largest number of rows of several sequences that the session is given in one run; the graph was tested with as
            many.
    """

    manifest: Manifest
    runs: ProbeSession | StackMember
    as_probability: bool
    rows_per_call: int = LARGEST_CALL

    @classmethod
    def of(cls, manifest: Manifest, runs: ProbeSession | StackMember) -> LoadedProbe:
        """Makes a ``LoadedProbe`` of a probe's manifest (its metadata) and its runner (an onnxruntime session or a network in a stack of
        probes), which returns scores in the unit that the manifest states.
        """
        return cls(manifest, runs, manifest.output.unit is ScoreUnit.LOGIT and manifest.reduce_on is ScoreUnit.PROBABILITY)

    @property
    def pools(self) -> bool:
        """Returns whether the probe gives one score per rollout rather than one score per token."""
        return self.manifest.output.per is OutputPer.ROLLOUT


def load_probes(
    files: Sequence[ProbeFile], device: torch.device, running: Mapping[str, LoadedProbe] = MappingProxyType({})
) -> dict[str, LoadedProbe]:
    """Makes checked probe files ready to run, each in an onnxruntime session or in a stack (a set of probes that are computed together).

    Args:
        files: the probe files, without duplicates.
        device: device of the language model, such as ``cuda:0``.
        running: the probes that run already, keyed by ``name@version``. Those that are among ``files`` too are taken as they are; a stack
            is built and checked anew if any of its probes comes or goes.

    Returns:
        The loaded probes, a dictionary keyed by ``name@version``, in the order given.

    Raises:
        ProbeRefused: onnxruntime cannot run a graph.
    """
    keys = {file.manifest.key for file in files}
    networks = {file.manifest.key: _network(file) for file in files if file.manifest.key not in running}
    changed = {_stacked_at(file.manifest) for file in files if networks.get(file.manifest.key) is not None}
    changed |= {_stacked_at(probe.manifest) for key, probe in running.items() if key not in keys and isinstance(probe.runs, StackMember)}
    kept = {
        key: probe
        for key, probe in running.items()
        if key in keys and not (isinstance(probe.runs, StackMember) and _stacked_at(probe.manifest) in changed)
    }
    left = [file for file in files if file.manifest.key not in kept]
    sessions = {file.manifest.key: ProbeSession(file, session_device(device)) for file in left}
    by_place: dict[tuple[Tap, str], dict[str, Network]] = defaultdict(dict)
    for file in left:
        network = networks[file.manifest.key] if file.manifest.key in networks else _network(file)
        if network is not None:
            by_place[_stacked_at(file.manifest)][file.manifest.key] = network
    members: dict[str, StackMember] = {}
    for (tap, _), networks_there in by_place.items():
        members |= _stacked(tap, networks_there, sessions, device)
    loaded = {
        file.manifest.key: LoadedProbe.of(file.manifest, members.get(file.manifest.key, sessions[file.manifest.key])) for file in left
    }
    ready = kept | loaded
    return {file.manifest.key: ready[file.manifest.key] for file in files}


def _stacked_at(manifest: Manifest) -> tuple[Tap, str]:
    """Returns the first tap (place in the model) of a probe, and the adapter that it brings: a stack has the probes of one such place,
    since activations with an adapter are others.
    """
    return manifest.taps[0], "" if manifest.adapter is None else manifest.adapter.model_dump_json()


def _network(file: ProbeFile) -> Network | None:
    return read_network(onnx.load_from_string(file.graph), GraphSignature.of(file.manifest))


def needs_trial(file: ProbeFile, probe: LoadedProbe) -> bool:
    """Returns whether a probe's graph must be run on random sequences to show that its scores depend on no more than its manifest (its
    metadata) states.

    Such a trial is not needed for a probe that runs in a stack (a set of probes computed together), or whose operators prove that it scores
    row by row.
    """
    return isinstance(probe.runs, ProbeSession) and not is_row_by_row(onnx.load_from_string(file.graph), GraphSignature.of(file.manifest))


def limited_to_tried_calls(file: ProbeFile, probe: LoadedProbe, golden: Mapping[Tap, NDArray[np.float32]]) -> LoadedProbe:
    """Tests a probe's graph on random sequences of activations, and returns the probe, limited to runs of at most as many rows as gave
    right scores.

    Args:
        file: the probe's file.
        probe: the loaded probe, which runs as an onnxruntime session.
        golden: activations of the probe's golden rollouts (stored with the scores of the author's code), a dictionary keyed by tap (place
            in the model), ``(N, hidden_size)`` float32 each; row i is of the same token at every tap.

    Raises:
        ProbeRefused: the probe's scores depend on more than the ``context`` in its manifest (its metadata) states.
    """
    session = probe.runs
    assert isinstance(session, ProbeSession)  # noqa: S101

    def run(inputs: GraphInputs) -> NDArray[np.float32]:
        rows = {tap: torch.from_numpy(np.ascontiguousarray(inputs[str(tap)])).to(session.device) for tap in probe.manifest.taps}
        return session.run(rows, inputs.get(CU_SEQLENS), inputs.get(POSITIONS))

    if not len(next(iter(golden.values()))):
        raise ProbeRefused(file.file, "golden.cases", "no finite activations of golden rollouts", "rollouts that this model can read")
    around = RandomSequences(file.manifest, golden, np.random.default_rng(0))
    return replace(probe, rows_per_call=rows_tried(run, onnx.load_from_string(file.graph), around, file.file))


def _stacked(
    tap: Tap, networks: Mapping[str, Network], sessions: Mapping[str, ProbeSession], device: torch.device
) -> dict[str, StackMember]:
    """Puts probes that read one tap into a stack, if their scores in the stack equal those of their own onnxruntime sessions.

    A tap is a point in the language model, and a stack computes several probes in one pass. Returns the stacked probes, a dictionary keyed
    by ``name@version``.
    """
    stack = stack_networks([network.layers for network in networks.values()], device)
    differing = _differing(tap, stack, networks, sessions, device)
    for key, difference in differing.items():
        logger.warning("a stacked probe differs from its own graph, which is run instead", probe=key, standard_deviations=difference)
    kept = [key for key in networks if key not in differing]
    if differing and kept:
        stack = stack_networks([networks[key].layers for key in kept], device)
    return {key: StackMember(stack, number) for number, key in enumerate(kept)}


def _differing(
    tap: Tap, stack: Stack, networks: Mapping[str, Network], sessions: Mapping[str, ProbeSession], device: torch.device
) -> dict[str, float]:
    """Finds the probes whose scores in a stack (a set of probes computed together) differ too much, on fixed random rows of activations,
    from those of the probes' own onnxruntime sessions.

    Returns the differences, in standard deviations of the scores, a dictionary keyed by ``name@version``.
    """
    differing: dict[str, float] = {}
    starts = np.cumsum((0, *stack.labels))
    for scale in _CHECKED_SCALES:
        normal = np.random.default_rng(0).standard_normal((_CHECKED_ROWS, len(next(iter(networks.values())).centre)))
        rows = torch.from_numpy((scale * normal).astype(np.float32))
        together = _scores(stack, rows, device)
        for number, (key, network) in enumerate(networks.items()):
            found, own = together[:, starts[number] : starts[number + 1]], rows
            if network.centre.any() or (network.spread != 1).any():
                # rows as far from 0 as the graph expects them, where folding its standardisation into the weights costs digits
                own = torch.from_numpy((network.centre + network.spread * scale * normal).astype(np.float32))
                found = _scores(stack.select([number]), own, device)
            expected = sessions[key].run({tap: own.to(sessions[key].device)}, None, None)
            difference = _difference(found, expected)
            if not difference <= STACKED_TOLERANCE:
                differing[key] = difference
    return differing


def _scores(stack: Stack, rows: torch.Tensor, device: torch.device) -> NDArray[np.float32]:
    scores = torch.empty((len(rows), sum(stack.labels)), device=device)
    stack.score(rows.to(device), scores)
    found: NDArray[np.float32] = scores.cpu().numpy()
    return found


def _difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Returns the largest difference of a probe's scores from the expected ones beyond one rounding, in standard deviations of each label;
    NaN if a score is not finite.
    """
    exact = expected.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        beyond = np.abs(found - exact) - np.finfo(np.float32).eps * np.abs(exact)
        return float(np.where(beyond <= 0, 0, beyond / exact.std(axis=0)).max())
