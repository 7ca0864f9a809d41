"""Defines the descriptions of a server: its model, limits and workers, the memory that its devices freed or allocated, and the changes of a
reload of its probes.
"""

from __future__ import annotations

from dataclasses import dataclass

from probescore.types.readings import Reading


@dataclass(frozen=True)
class ModelInfo:
    """Description of the frozen language model of a server.

    Attributes:
        id: the model's name as configured in the server; of a path the last component only.
        revision: the model's revision; empty for a local model.
        fingerprint: digest of the model's weights and configuration, ``"sha256:…"``.
        model_type: the model's architecture, by its name in ``transformers``.
        hidden_size: the width of the residual stream.
        num_hidden_layers: number of decoder blocks of the whole model.
        num_loaded_layers: number of decoder blocks that are loaded, because some probe needs their activations.
        vocab_size: the number of token ids; ids are in ``[0, vocab_size)``.
        max_position_embeddings: maximum number of positions that the model was made for; 0 if unknown.
    """

    id: str
    revision: str
    fingerprint: str
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_loaded_layers: int
    vocab_size: int
    max_position_embeddings: int


@dataclass(frozen=True)
class Limits:
    """Maximum sizes of requests to a server; a request above a limit is refused, never cut short. The comments in the ``.proto`` file
    define what each limit counts.

    A limit of 0 means that the server, being of an earlier version, does not state the limit.
    """

    max_message_bytes: int
    max_request_tokens: int
    max_rollout_tokens: int
    max_queue_tokens: int
    max_batch_tokens: int
    max_request_rollouts: int = 0
    max_follow_ups: int = 0
    max_reductions: int = 0
    max_spans: int = 0
    max_span_scores: int = 0
    max_request_values: int = 0
    max_text_bytes_per_token: int = 0
    max_chat_messages: int = 0
    max_chat_seconds: float = 0.0
    max_calls: int = 0
    max_in_flight_bytes: int = 0
    max_connections: int = 0
    max_calls_per_connection: int = 0
    max_activation_bytes: int = 0
    max_activation_bytes_in_flight: int = 0


@dataclass(frozen=True)
class WorkerInfo:
    """Description of one worker process of a server.

    Attributes:
        device: the worker's device, such as ``cpu`` or ``cuda:0``.
        dtype: data type of the model's weights and activations: ``float32``, ``bfloat16`` or ``float16``.
        execution_path: implementation with which the worker runs the model: ``universal`` or ``packed``.
        ready: whether the worker can score.
        restarts: number of times that the worker has been restarted since the server started.
        asleep: whether the worker has freed its device's memory; until the worker is woken it cannot score, and requests wait.
    """

    device: str
    dtype: str
    execution_path: str
    ready: bool
    restarts: int
    asleep: bool = False


@dataclass(frozen=True)
class Transfer:
    """Record of the memory that one device of a server freed when it was put to sleep (``sleep``), or allocated when it was woken
    (``wake``). All numbers are 0 if the device was asleep, or awake, already.

    Attributes:
        device: the device, such as ``cpu`` or ``cuda:0``.
        seconds: duration of the move, without the time of waiting for the batch that was being computed.
        weight_bytes: bytes of weights copied between the device and host memory; 0 on a CPU, where weights stay in place.
        device_bytes: bytes of the device's memory that were freed or allocated: the change in the memory that torch holds on the device. On
            a CPU, the bytes of the key-value cache.
    """

    device: str
    seconds: float = 0.0
    weight_bytes: int = 0
    device_bytes: int = 0


@dataclass(frozen=True)
class ServerInfo:
    """Description of a server: its software, model, limits, workers and probes.

    Attributes:
        server_version: the version of the server's software.
        model: the frozen model.
        tokenizer_fingerprint: fingerprint of the server's tokenizer, ``"sha256:…"``; empty if the server has no tokenizer.
        limits: maximum sizes of requests.
        workers: the worker processes, one for each device.
        probes: ``name@version`` of each current probe, which a request may also mean by the bare name, or by naming no probe.
        retired_probes: ``name@version`` of each probe whose file is gone, and which is served for a while under this full name only.
        activation_taps: names of the taps (places in the model) whose activations the server gives, such as ``resid_post.6``; empty if it
            gives none.
        readings: the readings (whose activations the probes read) that a request can name, ``frozen`` first; empty if the server offers
            no others.
    """

    server_version: str
    model: ModelInfo
    tokenizer_fingerprint: str
    limits: Limits
    workers: tuple[WorkerInfo, ...]
    probes: tuple[str, ...]
    activation_taps: tuple[str, ...] = ()
    retired_probes: tuple[str, ...] = ()
    readings: tuple[Reading, ...] = ()


@dataclass(frozen=True)
class RefusedProbeFile:
    """Description of a probe file that a server did not take, because it failed a check.

    Attributes:
        file: the last component of the file's path.
        field: the part of the file that failed the check: a field of the manifest such as ``model.fingerprint``, or ``file``, ``graph`` or
            ``golden``.
        found: the value that the check found.
        expected: the value that the check expected.
    """

    file: str
    field: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.file}: {self.field}: found {self.found}, expected {self.expected}"


@dataclass(frozen=True)
class ReloadedProbes:
    """Description of the probes that a server serves after it has reloaded its probe files, and of the changes that the reload made.

    Probes are named as ``name@version``.

    Attributes:
        added: the probes that are current (served by name, as their files are there) and were not before the reload.
        retired: the probes that were current, and whose files are gone; the server serves them for a while under their full names.
        dropped: the probes that the server served before the reload, and does not serve any more.
        current_probes: all current probes after the reload, sorted by name and version.
        retired_probes: all retired probes, oldest first.
        refused: the files that failed a check. If a refused file has replaced the file of a current probe, that probe stays current.
        seconds: duration of the reload.
    """

    added: tuple[str, ...]
    retired: tuple[str, ...]
    dropped: tuple[str, ...]
    current_probes: tuple[str, ...]
    retired_probes: tuple[str, ...]
    refused: tuple[RefusedProbeFile, ...]
    seconds: float
