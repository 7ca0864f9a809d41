"""Settings: where they come from, what they refuse, and how the command line shows them."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from probescore import _channel
from probescore_server.cli.serve import PANELS, register
from probescore_server.errors import StartupError
from probescore_server.settings import ServerSettings, join_host_port, load_settings


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "probescore.yaml"


# -------------------------------------------------------------------------------------------------------------------- precedence


def test_flags_beat_the_environment_beats_the_file_beats_the_default(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text("model: file\nport: 1\nhost: file\ndtype: float16\n")
    monkeypatch.setenv("PROBESCORE_PORT", "2")
    monkeypatch.setenv("PROBESCORE_HOST", "environment")
    settings = load_settings({"port": 3}, config)
    assert (settings.port, settings.host, settings.dtype, settings.drain_seconds) == (3, "environment", "float16", 30.0)


def test_lists_come_as_yaml_lists_as_repeated_flags_or_separated_by_commas(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text("model: m\nprobes: [a.onnx, b.onnx]\n")
    assert load_settings({}, config).probes == ("a.onnx", "b.onnx")
    assert load_settings({"probes": ["c.onnx", "d.onnx,e.onnx"]}, config).probes == ("c.onnx", "d.onnx", "e.onnx")
    monkeypatch.setenv("PROBESCORE_PROBES", "d.onnx, e.onnx,")
    assert load_settings({}, config).probes == ("d.onnx", "e.onnx")


def test_an_empty_environment_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBESCORE_UNIX_SOCKET", "")
    assert load_settings({"model": "m"}).unix_socket is None


# ---------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("model: [", "not YAML"),
        ("- a\n- b\n", "expected a mapping"),
        ("1: 2\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("model: m\nmax_batch_token: 5\n", "max_batch_token: there is no such setting"),
        ("port: 5\n", "model: required"),
        ("model: m\nport: many\n", "port: "),
        ("model: m\ndtype: float64\n", "dtype: "),
        ("model: m\ndevices: gpu0\n", "devices: 'gpu0' is none of"),
        ("model: m\ndevices: auto,cpu\n", "devices: auto stands alone"),
        ("model: m\ninterceptors: auth\n", "interceptors: 'auth' is not of the form"),
        ("model: m\nlog_level: loud\n", "log_level: "),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(config: Path, content: str, problem: str) -> None:
    config.write_text(content)
    with pytest.raises(StartupError) as refused:
        load_settings({}, config)
    assert problem in str(refused.value)


def test_a_file_that_is_missing_or_not_text_is_refused(config: Path) -> None:
    with pytest.raises(StartupError, match="No such file"):
        load_settings({}, config)
    config.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StartupError, match="not YAML"):
        load_settings({}, config)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"max_request_tokens": 100}, ("max_request_tokens (100)", "max_rollout_tokens (32768)")),
        ({"max_queue_tokens": 100}, ("max_queue_tokens (100)", "max_request_tokens (1048576)")),
        ({"max_message_bytes": 1024}, ("max_message_bytes (1024)", "4 × max_request_tokens (4194304)")),
    ],
)
def test_limits_that_contradict_each_other_are_refused_naming_both(values: dict[str, int], names: tuple[str, str]) -> None:
    with pytest.raises(StartupError) as refused:
        load_settings({"model": "m", **values})
    assert all(name in str(refused.value) for name in names)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        ServerSettings(model="m").port = 1


@given(st.text() | st.integers() | st.none() | st.lists(st.text()), st.sampled_from(sorted(ServerSettings.model_fields)))
def test_any_value_is_accepted_or_refused_by_name(value: object, name: str) -> None:
    problem = ""
    try:
        load_settings({"model": "m", name: value})
    except StartupError as refused:
        problem = str(refused)
    assert not problem or name in problem


# ---------------------------------------------------------------------------------------------------------------------- defaults


def test_every_setting_says_what_it_is_for_and_every_number_has_bounds() -> None:
    for name, field in ServerSettings.model_fields.items():
        assert field.description, name
        if field.annotation in (int, float):
            bounds = {type(bound).__name__ for bound in field.metadata}
            assert {"Ge", "Le"} <= bounds, name


def test_the_default_server_is_reachable_from_this_machine_only_and_runs_no_code_of_models() -> None:
    settings = ServerSettings(model="m")
    assert (settings.address, settings.metrics_host, settings.trust_remote_code) == ("127.0.0.1:50051", "127.0.0.1", False)


def test_by_default_nobody_can_put_the_server_to_sleep() -> None:
    assert ServerSettings(model="m").admin is False


def test_the_server_allows_the_pings_of_our_client() -> None:
    assert ServerSettings(model="m").min_client_ping_seconds <= _channel.MIN_PING_SECONDS <= _channel.KEEPALIVE_SECONDS


@pytest.mark.parametrize(
    ("host", "address"), [("127.0.0.1", "127.0.0.1:5"), ("::1", "[::1]:5"), ("[::]", "[::]:5"), ("localhost", "localhost:5")]
)
def test_addresses_are_written_as_grpc_wants_them(host: str, address: str) -> None:
    assert join_host_port(host, 5) == address
    assert ServerSettings(model="m", unix_socket=Path("/run/p.sock")).address == "unix:/run/p.sock"


# ------------------------------------------------------------------------------------------------------------------ command line


def test_help_shows_every_setting_with_its_variable_and_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "dumb")
    app = typer.Typer(rich_markup_mode="rich")
    app.callback()(lambda: None)
    register(app)
    shown = CliRunner().invoke(app, ["serve", "--help"])
    assert shown.exit_code == 0
    for name, field in ServerSettings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown.output
        assert f"PROBESCORE_{name.upper()}" in shown.output
        assert field.description in shown.output
        for choice in get_args(field.annotation) if "Literal" in str(field.annotation) else ():
            assert choice in shown.output


def test_every_setting_stands_in_one_panel() -> None:
    assert sorted(name for names in PANELS.values() for name in names) == sorted(ServerSettings.model_fields)
