"""Runs a probe's ONNX graph in an onnxruntime session that reads torch tensors on their device without copies; only scores are copied."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from probescore.types import OutputPer, Tap
from probescore_server.activity import ACTIVITY
from probescore_server.errors import ProbeRefused
from probescore_server.failures import FailureKind, kind_of
from probescore_server.probes.format.graph import GraphFailed, checked_scores
from probescore_server.probes.format.probe_file import ProbeFile


def session_device(device: torch.device) -> torch.device:
    """Returns the device on which probes' ONNX graphs read their inputs: the model's device (such as ``cuda:0``) if onnxruntime supports
    it, else the CPU.
    """
    return device if device.type == "cuda" and "CUDAExecutionProvider" in ort.get_available_providers() else torch.device("cpu")


class ProbeSession:
    """onnxruntime session that runs the graph of one probe.

    Args:
        probe: a checked probe file.
        device: the device that holds the activations, as ``session_device`` returns it.

    Attributes:
        device: the device on which the session reads activations.

    Raises:
        ProbeRefused: onnxruntime cannot run the graph.
    """

    def __init__(self, probe: ProbeFile, device: torch.device) -> None:
        self.device = device
        self._manifest = probe.manifest
        self._probe = probe
        self.open()

    def open(self) -> None:
        """Creates a probe's onnxruntime session again after ``close``; the constructor also calls this method.

        Raises:
            ProbeRefused: onnxruntime cannot run the graph.
        """
        try:
            self._session = ort.InferenceSession(self._probe.graph, _session_options(), providers=_providers(self.device))
        except Exception as error:  # onnxruntime's own exceptions share no base class
            raise ProbeRefused(self._probe.file, "graph", f"a graph that onnxruntime refuses: {error}", "one that it can run") from None

    def close(self) -> None:
        """Frees the memory that a probe's onnxruntime session holds on its device.

        As long as an onnxruntime session exists, it keeps the graph's weights and the memory of its largest batch.
        """
        del self._session

    def run(
        self,
        rows: Mapping[Tap, torch.Tensor],
        cu_seqlens: NDArray[np.int64] | None,
        positions: NDArray[np.int64] | None,
        options: ort.RunOptions | None = None,
    ) -> NDArray[np.float32]:
        """Computes a probe's scores of some rows of activations with its onnxruntime session.

        Args:
            rows: activations, a dictionary keyed by tap (place in the model), ``(n, hidden_size)`` float32 each, contiguous, on the
                session's device, n ≥ 1.
            cu_seqlens: where each of the S sequences starts among the rows, and their end, ``(S + 1,)``; ``None`` for a probe that scores
                each row by itself.
            positions: each row's position in its rollout, ``(n,)``; used only if the graph takes positions.
            options: run options with which another thread can end the run.

        Returns:
            Scores, ``(n, labels)`` float32, or ``(S, labels)`` for a probe that pools by itself.

        Raises:
            GraphFailed: an operator fails on these rows, or the graph gives too many or too few scores.
        """
        ACTIVITY.begin(f"probe {self._manifest.key}", len(rows[self._manifest.taps[0]]))
        binding = self._session.io_binding()
        for tap in self._manifest.taps:
            tensor = rows[tap]
            binding.bind_input(str(tap), tensor.device.type, tensor.device.index or 0, np.float32, tuple(tensor.shape), tensor.data_ptr())
        if self._manifest.cu_seqlens and cu_seqlens is not None:
            binding.bind_cpu_input("cu_seqlens", cu_seqlens)
        if self._manifest.positions and positions is not None:
            binding.bind_cpu_input("positions", positions)
        binding.bind_output("scores", "cpu")
        if tensor.device.type == "cuda":
            # onnxruntime computes on a stream of its own, which does not wait for torch's
            torch.cuda.current_stream(tensor.device).synchronize()
        try:
            self._session.run_with_iobinding(binding, options)
        except RuntimeError as error:
            # onnxruntime has no exception type of its own; lack of memory and a failed device are no fault of the graph
            if kind_of(error) is not FailureKind.OTHER or "terminate flag" in str(error):
                raise
            raise GraphFailed("an operator fails") from error
        due = len(tensor) if self._manifest.output.per is OutputPer.TOKEN or cu_seqlens is None else len(cu_seqlens) - 1
        return checked_scores(binding.copy_outputs_to_cpu()[0], due, len(self._manifest.output.labels))


def _providers(device: torch.device) -> list[str | tuple[str, dict[str, object]]]:
    if device.type != "cuda":
        return ["CPUExecutionProvider"]
    # what onnxruntime allocates does not count towards torch's memory limit, so that each session is given the same limit
    total = torch.cuda.get_device_properties(device).total_memory
    limit = int(total * torch.cuda.get_per_process_memory_fraction(device))
    # TF32, onnxruntime's default, has 10 bits of mantissa
    options: dict[str, object] = {"device_id": device.index or 0, "gpu_mem_limit": limit, "use_tf32": 0}
    return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]


def _session_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # threads that spin between calls would take the cores from torch, and an arena would never free the largest batch's memory
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    return options
