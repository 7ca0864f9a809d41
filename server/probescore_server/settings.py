"""The server's settings: every policy of `probescore serve`, declared once.

Precedence: flags, then environment (``PROBESCORE_*``), then the YAML file of ``--config``, then the defaults below.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict, SettingsError

from probescore_server.errors import StartupError

ENVIRONMENT_PREFIX = "PROBESCORE_"
BYTES_PER_TOKEN = 4

Names = Annotated[tuple[str, ...], NoDecode]
"""A list of words, given one by one or separated by commas."""


class ServerSettings(BaseSettings):
    """Settings of a server. Frozen; `load_settings` reads them from all their sources.

    Raises:
        pydantic.ValidationError: a value is out of its bounds, or two contradict each other.
    """

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, extra="forbid", frozen=True, env_ignore_empty=True)

    # ----------------------------------------------------------------------------------------------------------- what is served
    model: str = Field(
        min_length=1,
        description="The frozen model: a directory, or an id on the Hugging Face hub.",
        examples=["./model", "Qwen/Qwen3-0.6B"],
    )
    revision: str = Field(
        "",
        description="Branch, tag or commit on the hub; empty = its default branch. Not for a directory.",
    )
    probes: Names = Field(
        (),
        description="Probe files, or directories of them (every *.onnx inside). Repeat the flag for several.",
        examples=["./probes", "cheating.onnx"],
    )
    accept_mismatch: Names = Field(
        (),
        description="Probes, by name, to serve even if made for another revision of the model or tokenizer. Every answer then says so.",
    )
    trust_remote_code: bool = Field(
        False,
        description="Run Python code that comes with the model. Leave it off unless you have read that code.",
    )

    # ------------------------------------------------------------------------------------------------------------------ compute
    devices: Names = Field(
        ("auto",),
        min_length=1,
        description="One worker process each: cpu, cuda:0, cuda:1… auto = every CUDA device there is, else cpu.",
    )
    device_map: Literal["none", "auto"] = Field(
        "none",
        description="auto = one worker, the model's blocks spread over every CUDA device: for models larger than one. Needs accelerate.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="Element type of the model's weights and activations. Probes always get float32.",
    )
    threads_per_worker: int = Field(
        0,
        ge=0,
        le=1024,
        description="CPU threads of one worker; 0 = the machine's cores divided among the workers.",
    )
    max_batch_tokens: int = Field(
        32_768,
        ge=1,
        le=16_777_216,
        description="Tokens of one device batch; a longer rollout makes one of its own. Where memory runs out, the server takes less.",
    )
    kv_cache_bytes: int = Field(
        1_073_741_824,
        ge=0,
        le=1_099_511_627_776,
        description="Bytes of keys and values kept on a device for prompts that begin like earlier ones (turns, the next epoch); 0 = none.",
    )

    device_memory_fraction: float = Field(
        1.0,
        ge=0.01,
        le=1,
        description="The most of a CUDA device's memory that torch may take in its worker; the rest is for others. Means nothing on a CPU.",
    )

    # --------------------------------------------------------------------------------------------------------------- addresses
    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address to listen on. The default is reachable from this machine only; 0.0.0.0 or [::] = from everywhere.",
    )
    port: int = Field(
        50051,
        ge=0,
        le=65535,
        description="TCP port; 0 = any free one (the log says which).",
    )
    unix_socket: Path | None = Field(
        None,
        description="Listen on this Unix socket instead of TCP.",
    )
    metrics_host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address of the Prometheus metrics.",
    )
    metrics_port: int = Field(
        9464,
        ge=0,
        le=65535,
        description="TCP port of the Prometheus metrics; 0 = any free one (the log says which).",
    )

    # ------------------------------------------------------------------------------------------------------------------- limits
    max_message_bytes: int = Field(
        33_554_432,
        ge=1024,
        le=2_147_483_647,
        description="Bytes of one request message. At least 4 per token of max_request_tokens.",
    )
    max_rollout_tokens: int = Field(
        32_768,
        ge=1,
        le=16_777_216,
        description="Tokens of one rollout: prompt, completion and its longest chain of follow-ups. Longer ones are refused, never cut.",
    )
    max_request_tokens: int = Field(
        1_048_576,
        ge=1,
        le=268_435_456,
        description="Tokens of one request, a prompt once per group, and what spans read a second time. At least max_rollout_tokens.",
    )
    max_queue_tokens: int = Field(
        4_194_304,
        ge=1,
        le=4_294_967_296,
        description="Tokens that may wait; calls over it are refused at once and told when to retry. At least max_request_tokens.",
    )

    max_request_rollouts: int = Field(
        16_384,
        ge=1,
        le=1_048_576,
        description="Completions of one request and all their follow-ups, counted together.",
    )
    max_follow_ups: int = Field(
        64,
        ge=0,
        le=65_536,
        description="Follow-ups of one completion, those that follow them included.",
    )
    max_reductions: int = Field(
        32,
        ge=1,
        le=1024,
        description="Reductions of one request.",
    )
    max_spans: int = Field(
        1024,
        ge=0,
        le=1_048_576,
        description="Spans of one completion, or of one follow-up.",
    )
    max_span_scores: int = Field(
        268_435_456,
        ge=1,
        le=1_099_511_627_776,
        description="Scores that the spans of a completion and its follow-ups read: tokens × labels × reductions, over all probes.",
    )
    max_request_values: int = Field(
        67_108_864,
        ge=1,
        le=536_870_912,
        description="Numbers in the answer to one request, each of 4 bytes: reduced scores, and scores per token where asked for.",
    )
    max_text_bytes_per_token: int = Field(
        16,
        ge=1,
        le=1024,
        description="Bytes of a text or rendered chat per token of max_rollout_tokens; of all in a request, of max_request_tokens.",
    )
    max_chat_messages: int = Field(
        1024,
        ge=1,
        le=1_048_576,
        description="Messages of one chat.",
    )
    max_chat_seconds: float = Field(
        2.0,
        ge=0.001,
        le=3600,
        description="Seconds for which the model's chat template may render one chat.",
    )
    max_calls: int = Field(
        8192,
        ge=1,
        le=1_048_576,
        description="Calls under way; further ones are refused at once and told when to retry.",
    )
    max_in_flight_bytes: int = Field(
        1_073_741_824,
        ge=1024,
        le=1_099_511_627_776,
        description="Bytes of the requests under way, decompressed, likewise; a single larger request is taken while there is no other.",
    )
    max_connections: int = Field(
        4096,
        ge=1,
        le=1_048_576,
        description="Connections; further ones are closed.",
    )
    max_calls_per_connection: int = Field(
        1024,
        ge=1,
        le=1_048_576,
        description="Calls under way on one connection; a client's further ones wait in the client.",
    )

    # --------------------------------------------------------------------------------------------------------------- operation
    drain_seconds: float = Field(
        30.0,
        ge=0,
        le=86_400,
        description="After SIGTERM or Ctrl-C: how long accepted calls may take to finish. A second Ctrl-C ends at once.",
    )
    worker_restart_seconds: float = Field(
        1.0,
        ge=0,
        le=3600,
        description="Pause before a worker that died is started again; doubled after each failed attempt, up to 60 times.",
    )
    worker_silent_seconds: float = Field(
        60.0,
        ge=1,
        le=86_400,
        description="A worker that gives no sign of life for so long is killed and started again, whatever it does.",
    )
    worker_start_seconds: float = Field(
        3600.0,
        ge=1,
        le=604_800,
        description="A worker that is not ready so long after its start is given up; a model from a slow disk or the hub needs more.",
    )
    step_seconds: float = Field(
        60.0,
        ge=0.1,
        le=86_400,
        description="A batch that computes so long without a step (2048 tokens of the model, a call of a probe's graph) is given up.",
    )
    step_seconds_per_1000_tokens: float = Field(
        100.0,
        ge=0,
        le=86_400,
        description="And so much longer for every 1000 tokens that the step is about. Raise it for a model slower than 10 tokens a second.",
    )
    keepalive_seconds: float = Field(
        30.0,
        ge=1,
        le=7200,
        description="A silent connection is pinged after so long, and closed if it does not answer within as long again.",
    )
    min_client_ping_seconds: float = Field(
        10.0,
        ge=0.1,
        le=7200,
        description="Clients that ping more often than this are disconnected.",
    )
    max_connection_age_seconds: float = Field(
        0.0,
        ge=0,
        le=604_800,
        description="Connections older than this are closed gently, so that clients find new replicas behind a DNS name; 0 = never.",
    )
    interceptors: Names = Field(
        (),
        description="grpc.aio server interceptors around every call, as module:attribute, outermost first: the place for authentication.",
        examples=["mycompany.auth:interceptor"],
    )
    admin: bool = Field(
        False,
        description="Serve ProbeAdminService, with which anyone who may call can put the server to sleep and wake it.",
    )
    log_format: Literal["auto", "console", "json"] = Field(
        "auto",
        description="auto = console on a terminal, else one JSON object per line. Logs go to stderr.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="Least severe messages to log.",
    )

    @field_validator("probes", "accept_mismatch", "devices", "interceptors", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        entries = [value] if isinstance(value, str) else value
        if not isinstance(entries, list | tuple) or not all(isinstance(entry, str) for entry in entries):
            return value
        return [word.strip() for entry in entries for word in entry.split(",") if word.strip()]

    @field_validator("devices")
    @classmethod
    def _devices_are_known(cls, devices: tuple[str, ...]) -> tuple[str, ...]:
        for device in devices:
            kind, _, index = device.partition(":")
            if device not in ("auto", "cpu") and not (kind == "cuda" and index.isdecimal()):
                raise ValueError(f"{device!r} is none of auto, cpu, cuda:0, cuda:1…")
        if "auto" in devices and len(devices) > 1:
            raise ValueError("auto stands alone")
        return devices

    @field_validator("interceptors")
    @classmethod
    def _interceptors_are_references(cls, interceptors: tuple[str, ...]) -> tuple[str, ...]:
        for reference in interceptors:
            module, _, attribute = reference.partition(":")
            if not module or not attribute:
                raise ValueError(f"{reference!r} is not of the form module:attribute")
        return interceptors

    @model_validator(mode="after")
    def _limits_fit_together(self) -> Self:
        at_least = (
            ("max_request_tokens", "max_rollout_tokens", 1),
            ("max_queue_tokens", "max_request_tokens", 1),
            ("max_message_bytes", "max_request_tokens", BYTES_PER_TOKEN),
        )
        for larger, smaller, factor in at_least:
            if getattr(self, larger) < factor * getattr(self, smaller):
                times = f"{factor} × " if factor > 1 else ""
                raise ValueError(
                    f"{larger} ({getattr(self, larger)}) must be at least {times}{smaller} ({factor * getattr(self, smaller)}), "
                    "or what the one allows could never be served"
                )
        return self

    @model_validator(mode="after")
    def _spread_takes_all_devices(self) -> Self:
        if self.device_map != "none" and (self.devices not in (("auto",), ("cpu",)) or self.device_memory_fraction < 1):
            raise ValueError("device_map takes every CUDA device, and all of its memory: leave devices and device_memory_fraction alone")
        return self

    @property
    def address(self) -> str:
        """What gRPC listens on: ``127.0.0.1:50051``, ``[::1]:50051`` or ``unix:/run/probescore.sock``."""
        return f"unix:{self.unix_socket}" if self.unix_socket is not None else join_host_port(self.host, self.port)


def load_settings(flags: Mapping[str, Any], config: Path | None = None) -> ServerSettings:
    """Reads the settings from all their sources.

    Args:
        flags: what was given on the command line, by setting.
        config: a YAML file: a mapping from setting to value.

    Raises:
        StartupError: the file cannot be read, or a setting is unknown, out of its bounds or in contradiction to another: names it.
    """
    from_file = {} if config is None else _read_yaml(config)

    try:
        return ServerSettings(**{**from_file, **EnvSettingsSource(ServerSettings)(), **flags})
    except ValidationError as error:
        raise StartupError("\n".join(_explain(problem) for problem in error.errors())) from None
    except SettingsError as error:
        raise StartupError(str(error)) from None


def join_host_port(host: str, port: int) -> str:
    """``host:port``, with the brackets that an IPv6 address needs."""
    try:
        is_bare_v6 = ipaddress.ip_address(host).version == 6
    except ValueError:
        is_bare_v6 = False
    return f"[{host}]:{port}" if is_bare_v6 else f"{host}:{port}"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise StartupError(f"config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StartupError(f"config {path}: not YAML: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise StartupError(f"config {path}: expected a mapping from setting to value, found {type(content).__name__}")
    return content


def _explain(problem: Mapping[str, Any]) -> str:
    name = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    match problem["type"]:
        case "missing":
            return f"{name}: required; give --{name} or set {ENVIRONMENT_PREFIX}{name.upper()}"
        case "extra_forbidden":
            return f"{name}: there is no such setting"
        case _ if not name:
            return str(message)
        case _:
            return f"{name}: {message}, got {problem['input']!r}"
