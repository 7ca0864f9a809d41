"""Activations over gRPC: the engine's own bits, in pieces, within limits, and only where the server was told to give them."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import safetensors.torch
import torch
from calls import scrape
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from models import BOS, HIDDEN_SIZE, VOCAB_SIZE
from parity_cases import EVERY_TAP, GROUPS
from parity_models import write_model
from running_server import RunningServer
from running_server import start_server as start

from probescore import AsyncProbeClient, Completion, CompletionActivations, Pool, ProbeClient, RolloutGroup, Scope, Span, Text
from probescore.errors import InvalidRequestError, MismatchError, OverloadedError, ServerError
from probescore.types import CompletionStatus
from probescore.v1 import activations_pb2, activations_pb2_grpc
from probescore.wire import ActivationOptions, activation_options_to_proto, group_to_proto
from probescore_server import Engine

StartServer = Callable[..., RunningServer]

EVERYTHING = ("tokens", "mean", "last", "max")
SERVICE = "probescore.v1.ActivationService"


@pytest.fixture(scope="module")
def reading(model: Path, probe_file: Path) -> Iterator[RunningServer]:
    """One server for all tests that leave it as it was. It remembers nothing, so that its batches are those of an engine."""
    with start(model, [probe_file], allow_activations="resid_pre.*,resid_post.1,mlp_*", kv_cache_bytes=0) as server:
        yield server


@pytest.fixture
def client(reading: RunningServer) -> Iterator[ProbeClient]:
    with ProbeClient(reading.address) as client:
        yield client


def random_ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(4, VOCAB_SIZE, count).tolist()


def assert_same_bits(ours: CompletionActivations, theirs: CompletionActivations) -> None:
    for name in ("group_index", "completion_index", "id", "status", "spans", "status_message", "inexact_ids", "prompt_tokens"):
        assert getattr(ours, name) == getattr(theirs, name), name
    np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
    np.testing.assert_array_equal(ours.selections, theirs.selections)
    for found, expected in ((ours.tokens, theirs.tokens), (ours.pooled, theirs.pooled)):
        assert list(found) == list(expected)
        for tap, rows in expected.items():
            assert (found[tap].dtype, found[tap].shape, found[tap].tobytes()) == (rows.dtype, rows.shape, rows.tobytes()), tap
    for our, their in zip(ours.follow_ups, theirs.follow_ups, strict=True):
        assert_same_bits(our, their)


# ------------------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("architecture", ["llama", "qwen3_next"])
def test_every_hook_is_the_engines_bit_for_bit(architecture: str, tmp_path: Path, start_server: StartServer) -> None:
    """The engine's are those of plain Hugging Face: test_activation_parity."""
    model = write_model(tmp_path, architecture)
    engine = Engine.load(str(model), taps=EVERY_TAP)
    server = start_server(model, [], allow_activations="*")
    with ProbeClient(server.address) as client:
        found = [*client.activations(GROUPS, EVERY_TAP, pool=EVERYTHING)]
        expected = [*engine.activations(GROUPS, EVERY_TAP, pool=EVERYTHING)]
        for ours, theirs in zip(found, expected, strict=True):
            assert_same_bits(ours, theirs)
        info = found[0].info
        assert info is not None
        assert (info.model_fingerprint, info.dtype) == (engine.info.model.fingerprint, "float32")
        assert info.taps == tuple(EVERY_TAP)


SOME = [
    RolloutGroup([BOS, *random_ids(5)], [Completion(random_ids(6, 1), id="plain"), []]),
    RolloutGroup(
        [BOS, *random_ids(3, 2)],
        [
            Completion(
                random_ids(7, 3),
                mask=[1, 0, 1, 1, 0, 0, 0],
                spans=(Span("answer", 1, 4), Span("nothing", 4, 6)),
                follow_ups=(
                    Completion(random_ids(3, 4), id="asked", follow_ups=(Completion(random_ids(2, 5)),)),
                    Completion(random_ids(1, 6)),
                ),
            )
        ],
    ),
    RolloutGroup([], [random_ids(4, 7)]),
    RolloutGroup(Text("def f"), ["return x"]),
]


@pytest.mark.parametrize("scope", Scope)
async def test_masks_spans_follow_ups_texts_and_scopes_are_the_engines(model: Path, reading: RunningServer, scope: Scope) -> None:
    asked = SOME
    if scope is Scope.PROMPT:
        asked = [RolloutGroup(group.prompt, [Completion([5, 6], follow_ups=(Completion([7]),))]) for group in SOME]
    taps = ["mlp_out.1", "resid_pre.0"]
    engine = Engine.load(str(model), taps=taps, max_kv_cache_bytes=0)
    expected = [*engine.activations(asked, taps, pool=EVERYTHING, scope=scope)]
    with ProbeClient(reading.address) as client:
        ours = [*client.activations(asked, taps, pool=EVERYTHING, scope=scope)]
    async with AsyncProbeClient(reading.address) as async_client:
        theirs = [found async for found in async_client.activations(asked, taps, pool=EVERYTHING, scope=scope)]
    for found in (ours, theirs):
        assert len(found) == len(expected)
        for our, their in zip(found, expected, strict=True):
            assert_same_bits(our, their)


def test_what_is_sent_in_many_calls_is_what_is_sent_in_one(client: ProbeClient) -> None:
    whole = [*client.activations(SOME, "resid_post.1", pool=EVERYTHING)]
    for bytes_per_call in (1, 20 * HIDDEN_SIZE * 4):
        apart = [*client.activations(iter(SOME), "resid_post.1", pool=EVERYTHING, bytes_per_call=bytes_per_call)]
        for ours, theirs in zip(apart, whole, strict=True):
            assert (ours.group_index, ours.completion_index, ours.id) == (theirs.group_index, theirs.completion_index, theirs.id)
            np.testing.assert_allclose(ours.tokens["resid_post.1"], theirs.tokens["resid_post.1"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_half_the_bytes_are_rounded_as_torch_rounds(client: ProbeClient, dtype: str, kind: torch.dtype) -> None:
    exact = [*client.activations(SOME, ["resid_post.1", "mlp_out.0"], pool=("tokens", "mean"))]
    half = [*client.activations(SOME, ["resid_post.1", "mlp_out.0"], pool=("tokens", "mean"), dtype=dtype)]
    for ours, theirs in zip(half, exact, strict=True):
        for tap, rows in theirs.tokens.items():
            assert ours.tokens[tap].dtype == np.float32
            np.testing.assert_array_equal(ours.tokens[tap], torch.from_numpy(rows).to(kind).float().numpy())
            np.testing.assert_array_equal(ours.pooled[tap], torch.from_numpy(theirs.pooled[tap]).to(kind).float().numpy())


def test_a_number_beyond_the_format_costs_its_completion_and_is_named(model: Path, tmp_path: Path, start_server: StartServer) -> None:
    shutil.copytree(model, tmp_path / "model")
    weights = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"][50, 3] = 70_000.0
    weights["model.embed_tokens.weight"][90] = float("nan")
    safetensors.torch.save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    server = start_server(tmp_path / "model", [], allow_activations="resid_pre.0")
    asked = [RolloutGroup([BOS], [[5, 6], Completion([7], follow_ups=(Completion([8, 50]),)), [9, 90]])]
    with ProbeClient(server.address) as client:
        assert client.get_server_info().model.num_loaded_layers == 1  # as deep as the tap needs
        plain, forked, broken = client.activations(asked, "*", pool=EVERYTHING, dtype="float16")
        assert plain.status is forked.status is CompletionStatus.OK
        (overflown,) = forked.follow_ups
        assert (overflown.status, overflown.tokens, overflown.pooled) == (CompletionStatus.OVERFLOW, {}, {})
        assert overflown.status_message == (
            "resid_pre.0: 70,000 in row 1 of tokens is beyond float16, whose largest number is 65,504; ask for bfloat16 or float32"
        )
        assert overflown.token_ids.tolist() == [8, 50]
        assert (broken.status, broken.tokens) == (CompletionStatus.NON_FINITE, {})
        assert [found.status for found in client.activations(asked[:1], "*", dtype="bfloat16")][:2] == [CompletionStatus.OK] * 2
        (whole,) = client.activations([RolloutGroup([BOS], [[8, 50]])], "*", dtype="bfloat16")
        assert whole.tokens["resid_pre.0"].max() == pytest.approx(70_000, rel=2**-8)


# ----------------------------------------------------------------------------------------------------------- what the server tells


def test_the_server_tells_where_it_reads_and_how_much_it_sends(client: ProbeClient, reading: RunningServer) -> None:
    info = client.get_server_info()
    taps = {*(f"resid_pre.{layer}" for layer in range(4)), "resid_post.1", *(f"mlp_out.{layer}" for layer in range(4))}
    assert set(info.activation_taps) == taps
    assert (info.limits.max_activation_bytes, info.limits.max_activation_bytes_in_flight) == (1 << 28, 1 << 30)
    with grpc.insecure_channel(reading.address) as channel:
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE))
        assert status.status == health_pb2.HealthCheckResponse.SERVING
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        (listed,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([listing]))
        assert SERVICE in {service.name for service in listed.list_services_response.service}


def test_metrics_count_what_is_read(client: ProbeClient, reading: RunningServer) -> None:
    name = "probescore_activation_bytes_total{}"
    computed = 'probescore_tokens_total{source="computed"}'
    before = scrape(reading)
    (found,) = client.activations(
        [RolloutGroup([BOS, 5], [[6, 7, 8]])], ["resid_post.1", "mlp_out.0"], pool=("tokens", "max"), dtype="bfloat16"
    )
    after = scrape(reading)
    assert after[name] - before.get(name, 0) == 2 * (3 + 1) * HIDDEN_SIZE * 2
    assert after[computed] - before[computed] == 5
    assert found.info is not None
    assert found.info.usage.tokens_computed == 5
    started = f'grpc_server_started_total{{grpc_method="ReadActivations",grpc_service="{SERVICE}",grpc_type="server_stream"}}'
    assert after[started] == before.get(started, 0) + 1


def test_what_the_documentation_shows_runs(reading: RunningServer) -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/activations.md").read_text()
    (shown,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "localhost:50051" in block]
    exec(shown.replace("localhost:50051", reading.address), names := {})  # noqa: S102
    assert names["found"].completion_index == 1


# ------------------------------------------------------------------------------------------------------------------------ refusals


def test_it_is_off_unless_taps_are_named(served: RunningServer) -> None:
    with ProbeClient(served.address) as client, pytest.raises(ServerError, match="its setting allow_activations names no taps") as refusal:
        next(client.activations([RolloutGroup([BOS], [[5]])], "*"))
    assert refusal.value.reason == "ACTIVATIONS_OFF"
    with grpc.insecure_channel(served.address) as channel, pytest.raises(grpc.RpcError) as error:
        next(activations_pb2_grpc.ActivationServiceStub(channel).ReadActivations(activations_pb2.ReadActivationsRequest()))
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_tap_that_the_model_does_not_have_ends_the_start(model: Path, start_server: StartServer) -> None:
    with pytest.raises(RuntimeError, match=r"cannot start: allow_activations: 'resid_post.9' is none of the taps of this model"):
        start_server(model, [], allow_activations="resid_post.9")


def request(**changed: object) -> activations_pb2.ReadActivationsRequest:
    options = {"taps": ("resid_post.1",), "pools": (Pool.MEAN,), **changed}
    message = activation_options_to_proto(ActivationOptions(**options))  # type: ignore[arg-type]
    message.groups.append(group_to_proto(RolloutGroup([BOS, 5], [[6, 7, 8]]), "groups[0]"))
    return message


def changed(**fields: object) -> activations_pb2.ReadActivationsRequest:
    message = request()
    for name, value in fields.items():
        if isinstance(value, list):
            getattr(message, name)[:] = value
        else:
            setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (
            request(taps=("final_norm",)),
            r"taps\[0\]: 'final_norm' is none of the taps that this server was started for \(its setting allow",
        ),
        (request(taps=("resid_post.2",)), r"taps\[0\]: 'resid_post.2' is none of"),  # a probe reads there
        (request(taps=()), r"taps: at least one is needed"),
        (request(taps=("resid_post.1",) * 10), r"taps: 10 names or patterns, of 9 taps; name each once"),
        (request(pools=()), r"pools: at least one is needed"),
        (changed(pools=[1, 9]), r"pools\[1\]: unknown value 9; expected one of 1, 2, 3, 4"),
        (changed(pools=[0]), r"pools\[0\]: unknown value 0"),
        (changed(dtype=2), r"dtype: unknown value 2; expected one of 1, 6, 7"),
        (changed(scope=7), r"scope: unknown value 7"),
        (changed(priority=101), r"priority: 101 is not between -100 and 100"),
        (changed(run_id="x" * 257), r"run_id: has 257 bytes; the limit is 256"),
        (activations_pb2.ReadActivationsRequest(taps=["mlp_out.0"], pools=[2]), r"groups: at least one group is needed"),
    ],
)
def test_a_wrong_field_is_named(reading: RunningServer, message: activations_pb2.ReadActivationsRequest, problem: str) -> None:
    with grpc.insecure_channel(reading.address) as channel, pytest.raises(grpc.RpcError, match=problem) as error:
        next(activations_pb2_grpc.ActivationServiceStub(channel).ReadActivations(message))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "grpc-status-details-bin" in dict(error.value.trailing_metadata())


def test_the_client_names_the_place_in_what_it_was_given(client: ProbeClient) -> None:
    asked = [RolloutGroup([BOS], [[5]]), RolloutGroup([BOS], [[6], [7, VOCAB_SIZE]])]
    found = client.activations(asked, "resid_post.1", bytes_per_call=1)
    assert [next(found).group_index, next(found).group_index] == [0, 1]
    with pytest.raises(InvalidRequestError) as refusal:
        next(found)
    assert refusal.value.field == "groups[1].completions[1].ids"
    for wrong, field in (({"pool": "median"}, "pool"), ({"pool": []}, "pool"), ({"dtype": "int8"}, "dtype"), ({"scope": "some"}, "scope")):
        with pytest.raises(InvalidRequestError) as refusal:
            client.activations(asked, "resid_post.1", **wrong)
        assert refusal.value.field == field
    with pytest.raises(MismatchError):
        next(client.activations(asked, "resid_post.1", expected_model_fingerprint="sha256:other"))


# ------------------------------------------------------------------------------------------------- cancel, deadlines, slow readers


@pytest.fixture(scope="module")
def wide_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with a thin, wide model, whose activations are many bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=2048,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    with start(directory, [], allow_activations="resid_*", kv_cache_bytes=0, max_activation_bytes=1 << 30, max_batch_tokens=4096) as server:
        yield server


@pytest.fixture
def wide(wide_server: RunningServer) -> RunningServer:
    until_idle(wide_server)
    return wide_server


def until_idle(server: RunningServer) -> None:
    """Waits until no call is under way: one that its client has left ends a moment later, and counts until then."""
    end = time.monotonic() + 30
    while scrape(server)["probescore_rpcs_in_flight{}"] and time.monotonic() < end:
        time.sleep(0.05)


def wide_request(completions: int, tokens: int = 512) -> activations_pb2.ReadActivationsRequest:
    message = activation_options_to_proto(ActivationOptions(("resid_*",), (Pool.TOKENS,)))
    group = RolloutGroup([1], [np.random.default_rng(seed).integers(4, 100, tokens) for seed in range(completions)])
    message.groups.append(group_to_proto(group, "groups[0]"))
    return message


def tokens_computed(server: RunningServer) -> float:
    return scrape(server).get('probescore_tokens_total{source="computed"}', 0)


def test_an_answer_beyond_the_budget_is_refused_before_anything_is_computed(wide: RunningServer) -> None:
    budget = 1 << 30
    before = tokens_computed(wide)
    with grpc.insecure_channel(wide.address) as channel:
        stub = activations_pb2_grpc.ActivationServiceStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            next(stub.ReadActivations(wide_request(65)))
        asked = 65 * 512 * 4 * 2048 * 4
        problem = f"groups: {asked} bytes of activations in its answer; the limit max_activation_bytes is {budget}: send it in several"
        assert problem in str(error.value.details())
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert tokens_computed(wide) == before
        allowed = wide_request(65)
        allowed.dtype = 6  # bfloat16, of half the bytes
        for message in (wide_request(64), allowed):
            call = stub.ReadActivations(message)
            assert next(call).parts
            call.cancel()
            until_idle(wide)


def resident_bytes(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


def test_messages_are_about_a_mebibyte_and_a_completion_goes_over_many(wide: RunningServer) -> None:
    with grpc.insecure_channel(wide.address) as channel:  # with gRPC's own limit of 4 MiB on a message
        messages = [*activations_pb2_grpc.ActivationServiceStub(channel).ReadActivations(wide_request(2))]
    assert len(messages) >= 16
    assert max(message.ByteSize() for message in messages) < 1.1 * (1 << 20)
    assert sum(message.info.usage.tokens_computed for message in messages) == 1 + 2 * 512


def test_a_slow_reader_stops_the_device_and_is_held_in_bounds(wide: RunningServer) -> None:
    asked = wide_request(48)  # 48 × 16 MiB
    with grpc.insecure_channel(wide.address) as channel, ProbeClient(wide.address) as other:
        stub = activations_pb2_grpc.ActivationServiceStub(channel)
        before, computed = resident_bytes(wide.pid), tokens_computed(wide)
        call = stub.ReadActivations(asked)
        next(call)
        seen = [-1.0, tokens_computed(wide)]
        while seen[-1] != seen[-2]:
            time.sleep(1.0)
            seen.append(tokens_computed(wide))
        held = resident_bytes(wide.pid) - before
        assert seen[-1] - computed < 24 * 512  # of 48 × 512, the rest waits
        assert held < 400 << 20
        (short,) = other.activations([RolloutGroup([1], [[5, 6]])], "resid_post.1")  # nobody else waits for it
        assert short.status is CompletionStatus.OK
        rest = sum(part.rows.rows.shape[0] for message in call for part in message.parts if part.HasField("rows"))
        assert rest > 40 * 512 * 4


def test_a_client_that_leaves_stops_the_device(wide: RunningServer) -> None:
    before = tokens_computed(wide)
    with grpc.insecure_channel(wide.address) as channel:
        call = activations_pb2_grpc.ActivationServiceStub(channel).ReadActivations(wide_request(48))
        next(call)
        call.cancel()
    time.sleep(1.0)
    stopped = tokens_computed(wide)
    time.sleep(1.0)
    assert tokens_computed(wide) == stopped < before + 30 * 512
    with ProbeClient(wide.address) as client:
        assert len([*client.activations([RolloutGroup([1], [[5, 6]])], "resid_post.1")]) == 1


def test_a_deadline_ends_a_call(wide: RunningServer) -> None:
    with grpc.insecure_channel(wide.address) as channel:
        call = activations_pb2_grpc.ActivationServiceStub(channel).ReadActivations(wide_request(48), timeout=0.3)
        with pytest.raises(grpc.RpcError) as error:
            assert len([*call]) == 0
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_answers_beyond_what_may_be_under_way_are_refused_and_come_later(wide: RunningServer) -> None:
    first = wide_request(60)  # 60 × 16 MiB of 1 GiB
    async with grpc.aio.insecure_channel(wide.address) as channel, AsyncProbeClient(wide.address, restart_budget=0) as hasty:
        call = activations_pb2_grpc.ActivationServiceStub(channel).ReadActivations(first)
        await call.read()
        group = RolloutGroup([1], [np.random.default_rng(seed).integers(4, 100, 512) for seed in range(5)])
        with pytest.raises(
            OverloadedError, match="bytes of activations would be under way; the limit max_activation_bytes_in_flight is 1073741824"
        ):
            _ = [found async for found in hasty.activations([group], "resid_*", bytes_per_call=1 << 30)]
        async with AsyncProbeClient(wide.address) as patient:
            waiting = asyncio.create_task(_count(patient, group))
            await asyncio.sleep(0.3)
            call.cancel()
            assert await waiting == 5


async def _count(client: AsyncProbeClient, group: RolloutGroup) -> int:
    return len([found async for found in client.activations([group], "resid_*", bytes_per_call=1 << 30)])


def test_scores_and_activations_share_the_queue(client: ProbeClient, model: Path, reading: RunningServer) -> None:
    groups = [RolloutGroup([BOS, *random_ids(8)], [random_ids(9, seed) for seed in range(4)])]
    alone = client.score(groups).values("direction")
    for _ in range(3):
        read = client.activations(groups, "resid_post.1", pool="mean")
        assert client.score(groups).values("direction") == pytest.approx(alone, abs=1e-5)
        assert len([*read]) == 4


def test_a_worker_that_dies_costs_time_only(wide: RunningServer) -> None:
    group = RolloutGroup([1], [np.random.default_rng(seed).integers(4, 100, 512) for seed in range(12)])
    with ProbeClient(wide.address) as client:
        found = client.activations([group], "resid_*", bytes_per_call=64 << 20)
        first = next(found)
        os.kill(wide.worker_pid(), signal.SIGKILL)
        rest = [*found]
    assert [one.completion_index for one in (first, *rest)] == [*range(12)]
