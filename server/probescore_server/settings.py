"""Declares the server's settings, which are the options of ``probescore serve``, each with its default, bounds and description.

A flag takes precedence over the environment variable ``PROBESCORE_*``, which takes precedence over the YAML file of ``--config``, which
takes precedence over the default.
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
"""Type of a setting that is a list of words, given one by one or separated by commas."""


class ServerSettings(BaseSettings):
    """Value object with the settings of a server. ``load_settings`` makes one from the flags, the environment and a YAML file.

    Raises:
        pydantic.ValidationError: a value is out of its bounds, or two values contradict each other.
    """

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, extra="forbid", frozen=True, env_ignore_empty=True)

    # ----------------------------------------------------------------------------------------------------------- what is served
    model: str = Field(
        min_length=1,
        description="The frozen model is loaded from this directory, or from this id on the Hugging Face hub.",
        examples=["./model", "Qwen/Qwen3-0.6B"],
    )
    revision: str = Field(
        "",
        description="The model is taken from this branch, tag or commit on the hub; empty = the default branch. It is not for a directory.",
    )
    probes: Names = Field(
        (),
        description="These probe files are served, every *.onnx file in these directories, and those of a repository on the Hugging Face "
        "hub: hf:ORGANISATION/REPOSITORY, with @REVISION and :FILE if wanted. Repeat the flag for several.",
        examples=["./probes", "cheating.onnx", "hf:org/probes@main"],
    )
    watch_probes: float = Field(
        0.0,
        ge=0,
        le=86_400,
        description="The server looks for changed probe files every this many seconds, and follows those that then stay as they are "
        "as long again; 0 = only on SIGHUP and Reload.",
    )
    probe_pin_seconds: float = Field(
        3600.0,
        ge=0,
        le=31_536_000,
        description="A version whose file is gone is served, under its full name, until no call has named it for this many seconds.",
    )
    max_retired_versions: int = Field(
        2,
        ge=0,
        le=1024,
        description="At most this many versions of a name whose files are gone are served; the oldest go first.",
    )
    deeper_probes: Literal["refuse", "load"] = Field(
        "refuse",
        description="A new probe that needs more of the model's blocks than are loaded is refused; load = a second worker loads the deeper "
        "model beside the first and takes over, for which the device needs room for both.",
    )
    accept_mismatch: Names = Field(
        (),
        description="Probes of these names are served even if made for another revision of the model or tokenizer. "
        "Every answer then says so.",
    )
    trust_remote_code: bool = Field(
        False,
        description="The server runs Python code that comes with the model. Leave it off unless you have read that code.",
    )

    allow_activations: Names = Field(
        (),
        description="The server offers ActivationService, with which anyone who may call can read activations at these taps, "
        "or patterns of their names, of the model and of its readings. As many blocks are loaded as the deepest of them needs. "
        "Empty = it is off.",
        examples=["resid_post.14", "'resid_post.*'"],
    )

    readings_root: Path | None = Field(
        None,
        description="Beside the frozen model the server reads adapters and checkpoints, such as a policy's, from directories below this "
        "one, as anyone who may call ProbeAdminService asks it to. It needs admin. Not set = it is off.",
        examples=["/checkpoints"],
    )
    max_readings: int = Field(
        4,
        ge=1,
        le=1024,
        description="At most this many adapters and checkpoints are loaded at a time, each under a name of its own. As many more, which "
        "were replaced or unloaded, may stay for calls under way that began with them; a further load waits for such calls, at most "
        "drain_seconds.",
    )

    # ------------------------------------------------------------------------------------------------------------------ compute
    devices: Names = Field(
        ("auto",),
        min_length=1,
        description="Each device gets a worker process: cpu, cuda:0, cuda:1… auto = every CUDA device of the machine, else cpu.",
    )
    device_map: Literal["none", "auto"] = Field(
        "none",
        description="auto = one worker spreads the model's blocks over every CUDA device, for models larger than one. It needs accelerate.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="The model's weights and activations have this element type. Probes always get float32.",
    )
    threads_per_worker: int = Field(
        0,
        ge=0,
        le=1024,
        description="A worker uses this many CPU threads; 0 = the machine's cores divided among the workers.",
    )
    max_batch_tokens: int = Field(
        32_768,
        ge=1,
        le=16_777_216,
        description="A batch has at most this many tokens; a longer rollout is a batch of its own. "
        "Where memory runs out, batches get smaller.",
    )
    kv_cache_bytes: int = Field(
        1_073_741_824,
        ge=0,
        le=1_099_511_627_776,
        description="A device keeps up to these bytes of keys and values for prompts that begin like earlier ones (turns, "
        "epochs); 0 = none.",
    )

    device_memory_fraction: float = Field(
        1.0,
        ge=0.01,
        le=1,
        description="A worker may take at most this share of its CUDA device's memory; the rest is for others. It has no effect on a CPU.",
    )

    # --------------------------------------------------------------------------------------------------------------- addresses
    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="The server listens on this address. The default is reachable from this machine only; "
        "0.0.0.0 or [::] = from everywhere.",
    )
    port: int = Field(
        50051,
        ge=0,
        le=65535,
        description="The server listens on this TCP port; 0 = any free one (the log says which).",
    )
    unix_socket: Path | None = Field(
        None,
        description="The server listens on this Unix socket instead of TCP.",
    )
    metrics_host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="The Prometheus metrics are served on this address.",
    )
    metrics_port: int = Field(
        9464,
        ge=0,
        le=65535,
        description="The Prometheus metrics are served on this TCP port; 0 = any free one (the log says which).",
    )

    # ------------------------------------------------------------------------------------------------------------------- limits
    max_message_bytes: int = Field(
        33_554_432,
        ge=1024,
        le=2_147_483_647,
        description="A request message has at most this many bytes. It must be at least 4 per token of max_request_tokens.",
    )
    max_rollout_tokens: int = Field(
        32_768,
        ge=1,
        le=16_777_216,
        description="A rollout (prompt, completion, longest chain of follow-ups) has at most this many tokens. "
        "Longer ones are refused, never cut.",
    )
    max_request_tokens: int = Field(
        1_048_576,
        ge=1,
        le=268_435_456,
        description="A request has at most this many tokens, each group's prompt once, with those that spans read again. "
        "It must be at least max_rollout_tokens.",
    )
    max_queue_tokens: int = Field(
        4_194_304,
        ge=1,
        le=4_294_967_296,
        description="At most this many tokens wait; further calls are refused at once and told when to retry. "
        "It must be at least max_request_tokens.",
    )

    max_request_rollouts: int = Field(
        16_384,
        ge=1,
        le=1_048_576,
        description="A request has at most this many completions and follow-ups, counted together.",
    )
    max_follow_ups: int = Field(
        64,
        ge=0,
        le=65_536,
        description="A completion has at most this many follow-ups, nested ones included.",
    )
    max_reductions: int = Field(
        32,
        ge=1,
        le=1024,
        description="A request has at most this many reductions.",
    )
    max_spans: int = Field(
        1024,
        ge=0,
        le=1_048_576,
        description="A completion, or a follow-up, has at most this many spans.",
    )
    max_span_scores: int = Field(
        268_435_456,
        ge=1,
        le=1_099_511_627_776,
        description="Spans of a completion and its follow-ups read at most this many scores: tokens × labels × reductions, "
        "over all probes.",
    )
    max_request_values: int = Field(
        67_108_864,
        ge=1,
        le=536_870_912,
        description="An answer holds at most this many numbers, each of 4 bytes: reduced scores, and scores per token where asked for.",
    )
    max_activation_bytes: int = Field(
        268_435_456,
        ge=1,
        le=1_099_511_627_776,
        description="The answer to one call of ActivationService has at most this many bytes of activations.",
    )
    max_activation_bytes_in_flight: int = Field(
        1_073_741_824,
        ge=1,
        le=1_099_511_627_776,
        description="Answers of ActivationService under way have at most this many bytes of activations; "
        "further calls are refused at once and told when to retry. It must be at least max_activation_bytes.",
    )
    max_text_bytes_per_token: int = Field(
        16,
        ge=1,
        le=1024,
        description="A text or rendered chat has at most this many bytes per token of max_rollout_tokens; "
        "all texts of a request have at most this many per token of max_request_tokens.",
    )
    max_chat_messages: int = Field(
        1024,
        ge=1,
        le=1_048_576,
        description="A chat has at most this many messages.",
    )
    max_chat_seconds: float = Field(
        2.0,
        ge=0.001,
        le=3600,
        description="The model's chat template may take this many seconds to render one chat.",
    )
    max_calls: int = Field(
        8192,
        ge=1,
        le=1_048_576,
        description="At most this many calls are under way; further ones are refused at once and told when to retry.",
    )
    max_in_flight_bytes: int = Field(
        1_073_741_824,
        ge=1024,
        le=1_099_511_627_776,
        description="Requests under way have at most this many bytes, decompressed; "
        "further ones are refused at once and told when to retry. "
        "A single larger request is taken while there is no other.",
    )
    max_connections: int = Field(
        4096,
        ge=1,
        le=1_048_576,
        description="At most this many connections are open; further ones are closed.",
    )
    max_calls_per_connection: int = Field(
        1024,
        ge=1,
        le=1_048_576,
        description="At most this many calls are under way on one connection; further ones wait in the client.",
    )

    # --------------------------------------------------------------------------------------------------------------- operation
    drain_seconds: float = Field(
        30.0,
        ge=0,
        le=86_400,
        description="After SIGTERM or Ctrl-C, accepted calls may take this many seconds to finish. "
        "A second Ctrl-C ends the server at once. Loading a reading waits as long at most for calls that use an earlier version.",
    )
    worker_restart_seconds: float = Field(
        1.0,
        ge=0,
        le=3600,
        description="A worker that died is started again after this many seconds, doubled after each failed attempt, "
        "up to 60 times as many.",
    )
    worker_silent_seconds: float = Field(
        60.0,
        ge=1,
        le=86_400,
        description="A worker that sends nothing for this many seconds is killed and started again, whatever it does.",
    )
    worker_start_seconds: float = Field(
        3600.0,
        ge=1,
        le=604_800,
        description="A worker that is not ready this many seconds after its start is given up; "
        "a model from a slow disk or the hub needs more.",
    )
    step_seconds: float = Field(
        60.0,
        ge=0.1,
        le=86_400,
        description="A batch that completes no step (2048 tokens of the model, "
        "a call of a probe's graph) in this many seconds is given up.",
    )
    step_seconds_per_1000_tokens: float = Field(
        100.0,
        ge=0,
        le=86_400,
        description="A step may take this many seconds more for every 1000 of its tokens. "
        "Raise it for a model slower than 10 tokens a second.",
    )
    keepalive_seconds: float = Field(
        30.0,
        ge=1,
        le=7200,
        description="A silent connection is pinged after this many seconds, and closed if it does not answer within as many again.",
    )
    min_client_ping_seconds: float = Field(
        10.0,
        ge=0.1,
        le=7200,
        description="Clients that ping more often than every this many seconds are disconnected.",
    )
    max_connection_age_seconds: float = Field(
        0.0,
        ge=0,
        le=604_800,
        description="A connection older than this many seconds is closed, with drain_seconds for its calls to finish, "
        "so that clients find new replicas behind a DNS name; 0 = never.",
    )
    interceptors: Names = Field(
        (),
        description="These grpc.aio server interceptors surround every call, as module:attribute, outermost first; "
        "use them to authenticate.",
        examples=["mycompany.auth:interceptor"],
    )
    admin: bool = Field(
        False,
        description="The server offers ProbeAdminService, with which anyone who may call can put it to sleep and wake it, have probes "
        "follow their files and, with readings_root, load readings.",
    )
    log_format: Literal["auto", "console", "json"] = Field(
        "auto",
        description="Logs go to stderr in this format; auto = console on a terminal, else json, which is one JSON object per line.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="Messages of this level and of more severe ones are logged.",
    )

    @field_validator("probes", "accept_mismatch", "allow_activations", "devices", "interceptors", mode="before")
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
            ("max_activation_bytes_in_flight", "max_activation_bytes", 1),
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
    def _readings_are_loaded_by_somebody(self) -> Self:
        if self.readings_root is not None and not self.admin:
            raise ValueError("readings_root is of no use without admin: nobody could load a reading")
        return self

    @model_validator(mode="after")
    def _spread_takes_all_devices(self) -> Self:
        if self.device_map != "none" and (self.devices not in (("auto",), ("cpu",)) or self.device_memory_fraction < 1):
            raise ValueError("device_map takes every CUDA device, and all of its memory: leave devices and device_memory_fraction alone")
        return self

    @property
    def address(self) -> str:
        """Returns the address that gRPC listens on, such as ``127.0.0.1:50051``, ``[::1]:50051`` or ``unix:/run/probescore.sock``."""
        return f"unix:{self.unix_socket}" if self.unix_socket is not None else join_host_port(self.host, self.port)


def load_settings(flags: Mapping[str, Any], config: Path | None = None) -> ServerSettings:
    """Returns the server's settings, read from flags, then the environment, then a YAML file; the first of these sources that has a setting
    counts.

    Args:
        flags: a dictionary, keyed by setting, of the values given on the command line.
        config: path of a YAML file with a mapping from setting to value; ``None`` = no file.

    Raises:
        StartupError: the file cannot be read, or a setting, which the message names, is unknown, out of its bounds or contradicts another.
    """
    from_file = {} if config is None else _read_yaml(config)

    try:
        return ServerSettings(**{**from_file, **EnvSettingsSource(ServerSettings)(), **flags})
    except ValidationError as error:
        raise StartupError("\n".join(_explain(problem) for problem in error.errors())) from None
    except SettingsError as error:
        raise StartupError(str(error)) from None


def join_host_port(host: str, port: int) -> str:
    """Returns an address as ``host:port``, with the brackets around the host that an IPv6 address needs."""
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
