"""A name means one version at a time; a call ends with the version that it began with; what nobody means any more is freed."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from parity_models import write_model
from read_twice import BOUND, GROUPS, TAPS, Array, Served, both, deviations, plain_scores, token_scores, write_probes
from written_adapters import WrittenAdapter

from probescore import RolloutGroup
from probescore.types import ScoreResult
from probescore_server import Engine
from probescore_server.backbone.kv_cache import CacheBudget, KeyValueCache
from probescore_server.engine import reading_loading
from probescore_server.errors import InvalidRequest, ReadingRefused
from probescore_server.rollouts import CheckedRollout, Continuation, ResolvedOptions

FORMS = {"low rank": {}, "merged": {"use_dora": True}}


def read(result: ScoreResult, reading: str) -> Array:
    return np.concatenate([token_scores(result, name, reading) for name in TAPS])


def test_an_id_is_that_of_what_was_read(engine: Engine, llama: Served, tmp_path: Path) -> None:
    adapter = WrittenAdapter.random(llama.model, ["q_proj", "v_proj"])
    first = engine.load_reading("policy", adapter.write(tmp_path / "a"), step=1).reading
    same = engine.load_reading(
        "other", adapter.changed(peft_version="0.1", target_modules=["v_proj", "q_proj"]).write(tmp_path / "b")
    ).reading
    assert (same.id, same.name, same.step) == (first.id, "other", None)
    for number, changed in enumerate([
        adapter.changed(lora_alpha=9),
        adapter.changed(use_rslora=True),
        WrittenAdapter.random(llama.model, ["q_proj", "v_proj"], seed=1),
    ]):  # fmt: skip
        assert engine.load_reading("changed", changed.write(tmp_path / str(number))).reading.id != first.id
    again = engine.load_reading("policy", tmp_path / "a", step=2, expected_id=first.id)
    assert (again.reading.id, again.reading.step, again.replaced) == (first.id, 2, first)


def test_a_name_means_the_version_that_was_loaded_last(engine: Engine, llama: Served, tmp_path: Path) -> None:
    adapters = [WrittenAdapter.random(llama.model, seed=seed) for seed in range(2)]
    loaded = [engine.load_reading("policy", adapter.write(tmp_path / str(seed)), step=seed) for seed, adapter in enumerate(adapters)]
    assert loaded[0].replaced is None
    assert loaded[1].replaced == loaded[0].reading
    found = deviations(both(engine), plain_scores(adapters[1].merged()), "policy")
    assert {name: far for name, far in found.items() if not far <= BOUND} == {}
    assert engine.unload_reading("policy") == loaded[1].reading
    with pytest.raises(InvalidRequest, match="unknown reading 'policy'; loaded: frozen"):
        both(engine)


def test_a_refused_version_leaves_the_one_before(engine: Engine, llama: Served, tmp_path: Path) -> None:
    adapter = WrittenAdapter.random(llama.model)
    engine.load_reading("policy", adapter.write(tmp_path / "a"))
    before = read(both(engine), "policy")
    with pytest.raises(ReadingRefused):
        engine.load_reading("policy", adapter.changed(bias="all").write(tmp_path / "b"))
    np.testing.assert_array_equal(read(both(engine), "policy"), before)


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_freed_once_no_call_means_a_version(engine: Engine, llama: Served, tmp_path: Path, form: str) -> None:
    engine.load_reading("policy", WrittenAdapter.random(llama.model, **FORMS[form]).write(tmp_path / "a"))
    engine.load_reading("policy", WrittenAdapter.random(llama.model, seed=1, **FORMS[form]).write(tmp_path / "b"))
    both(engine)
    (reading,) = engine.readings()[1:]
    with engine._readings.pinned(["policy"], ()):
        own = [weakref.ref(tensor) for tensor in engine._readings.tensors()]
        engine.unload_reading("policy")
        assert engine._readings.version(reading.id).tensors
        assert all(tensor() is not None for tensor in own)
    assert own
    assert all(tensor() is None for tensor in own)  # without a garbage collection
    with pytest.raises(RuntimeError, match="is not loaded"):
        engine._readings.version(reading.id)
    assert list(engine._readings.tensors()) == []


def test_answers_under_replacement_are_of_one_version_each(llama: Served, tmp_path: Path) -> None:
    engine = llama.engine("middle")
    adapters = [WrittenAdapter.random(llama.model, ["q_proj", "down_proj"], seed=seed).write(tmp_path / str(seed)) for seed in range(3)]
    expected = {}
    for adapter in adapters:
        loaded = engine.load_reading("policy", adapter)
        engine.free_memory()
        expected[loaded.reading.id] = engine.score(GROUPS, readings=["policy"]).values("middle", reading="policy")
    frozen = engine.score(GROUPS).values("middle")
    results: list[ScoreResult] = []
    over = threading.Event()

    def score() -> None:
        while not over.is_set():
            results.append(engine.score(GROUPS, readings=("frozen", "policy")))

    threads = [threading.Thread(target=score) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(6):
        engine.load_reading("policy", adapters[number % 3], in_place=number == 4)
    over.set()
    for thread in threads:
        thread.join()
    assert len({result.info.readings[1].id for result in results}) > 1
    spread = np.std([*expected.values()])
    for result in results:
        np.testing.assert_allclose(result.values("middle"), frozen, rtol=0, atol=BOUND * frozen.std())
        own = expected[result.info.readings[1].id]
        np.testing.assert_allclose(result.values("middle", reading="policy"), own, rtol=0, atol=BOUND * spread)
    assert [reading.name for reading in engine.readings()] == ["frozen", "policy"]
    assert len(engine._readings._held) == 1


def test_in_place_frees_the_old_version_first_and_a_failure_unloads(engine: Engine, llama: Served, tmp_path: Path) -> None:
    adapters = [WrittenAdapter.random(llama.model, seed=seed) for seed in range(2)]
    first = engine.load_reading("policy", adapters[0].write(tmp_path / "a"), in_place=True)
    second = engine.load_reading("policy", adapters[1].write(tmp_path / "b"), in_place=True)
    assert second.replaced == first.reading
    found = deviations(both(engine), plain_scores(adapters[1].merged()), "policy")
    assert {name: far for name, far in found.items() if not far <= BOUND} == {}
    with pytest.raises(ReadingRefused):
        engine.load_reading("policy", adapters[0].changed(bias="all").write(tmp_path / "c"), in_place=True)
    assert [reading.name for reading in engine.readings()] == ["frozen"]
    engine.score(GROUPS)


def test_in_place_waits_for_the_calls_that_began_and_holds_those_that_come(
    engine: Engine, llama: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = [WrittenAdapter.random(llama.model, seed=seed).write(tmp_path / str(seed)) for seed in range(2)]
    old = engine.load_reading("policy", adapters[0]).reading
    reading, results = threading.Event(), {}
    read_files = reading_loading.read_weights
    monkeypatch.setattr(reading_loading, "read_weights", lambda *parts: reading.set() or read_files(*parts))

    def load() -> None:
        results["loaded"] = engine.load_reading("policy", adapters[1], in_place=True)

    def come_later() -> None:
        results["scored"] = engine.score(GROUPS, readings=["policy"])

    with engine._readings.pinned(["policy"], ()) as pinned:
        loading = threading.Thread(target=load)
        loading.start()
        assert not reading.wait(0.5)  # nothing new is read as long as the old version is in use
        later = threading.Thread(target=come_later)
        later.start()
        later.join(0.5)
        assert later.is_alive()
        engine.score(GROUPS)  # nobody else waits
        assert engine._readings.version(pinned.wanted[0].id).tensors
    loading.join()
    later.join()
    new = results["loaded"].reading
    assert old.id != new.id
    assert results["scored"].info.readings == (new,)


def test_unloading_what_is_replaced_in_place_unloads_what_comes(engine: Engine, llama: Served, tmp_path: Path) -> None:
    adapters = [WrittenAdapter.random(llama.model, seed=seed).write(tmp_path / str(seed)) for seed in range(2)]
    engine.load_reading("policy", adapters[0])
    results: dict[str, object] = {}
    loading = threading.Thread(target=lambda: results.update(loaded=engine.load_reading("policy", adapters[1], in_place=True).reading))
    unloading = threading.Thread(target=lambda: results.update(removed=engine.unload_reading("policy")))
    with engine._readings.pinned(["policy"], ()):
        for thread in (loading, unloading):
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
    loading.join()
    unloading.join()
    assert results["removed"] == results["loaded"]
    assert [reading.name for reading in engine.readings()] == ["frozen"]


def test_a_version_that_is_gone_is_never_answered_by_the_frozen_model(engine: Engine, llama: Served, tmp_path: Path) -> None:
    engine.load_reading("policy", WrittenAdapter.random(llama.model, ["q_proj"]).write(tmp_path))
    with engine._readings.pinned(["policy"], ()) as pinned:
        options = ResolvedOptions(probes=("last@1",), readings=pinned.wanted)
    engine.unload_reading("policy")
    rollout = CheckedRollout(np.array([1, 5], np.int32), Continuation(np.array([7], np.int32)), options)
    with pytest.raises(RuntimeError, match="is not loaded: a call must be pinned"):
        engine.score_rollouts([rollout])


# ------------------------------------------------------------------------------------------------------------ keys and values


def test_keys_and_values_are_never_those_of_another_reading(engine: Engine, llama: Served, tmp_path: Path) -> None:
    adapter = WrittenAdapter.random(llama.model)
    engine.load_reading("policy", adapter.write(tmp_path))
    prompt = [1, *range(20, 50)]
    turns = [RolloutGroup(prompt, [[60, 61, 62]]), RolloutGroup([*prompt, 60, 61], [[70, 71]])]
    engine.free_memory()
    alone = {each: engine.score(turns[1:], readings=[each]).values("last", reading=each) for each in ("frozen", "policy")}
    for order in (("frozen", "policy"), ("policy", "frozen")):
        engine.free_memory()
        for first in order:
            engine.score(turns[:1], readings=[first])
            result = engine.score(turns[1:], readings=("frozen", "policy"))
        assert result.info.usage.tokens_cached > 0
        for each in ("frozen", "policy"):
            np.testing.assert_allclose(result.values("last", reading=each), alone[each], atol=1e-4)
    assert abs(alone["frozen"] - alone["policy"]).max() > 1e-2


def test_all_caches_are_under_one_bound_and_the_oldest_use_goes_first() -> None:
    def run(tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.zeros(1, 1, tokens, 2), torch.zeros(1, 1, tokens, 2))]

    budget = CacheBudget(16 * 10)
    first, second = KeyValueCache(budget), KeyValueCache(budget)
    ids = [np.arange(start, start + 4, dtype=np.int32) for start in range(0, 40, 4)]
    first.put(ids[0], run(4))
    second.put(ids[1], run(4))
    first.longest_prefix(ids[0])
    second.put(ids[2], run(4))  # 12 tokens, of which 10 fit: the oldest use goes
    assert (first.known_tokens(ids[0]), second.known_tokens(ids[1]), second.known_tokens(ids[2])) == (4, 0, 4)
    second.put(ids[3], run(4))
    assert (first.known_tokens(ids[0]), second.known_tokens(ids[2])) == (0, 4)
    assert (budget.bytes, first.bytes, second.bytes) == (128, 0, 128)
    assert (budget.hits, budget.misses) == (1, 0)
    budget.remove(second)
    assert (budget.bytes, budget.hits) == (0, 1)


# ---------------------------------------------------------------------------------------------------------------- packed path


@pytest.fixture(scope="module")
def packed(llama: Served) -> Engine:
    return llama.packed_engine()


@pytest.mark.parametrize("form", FORMS)
def test_the_packed_path_reads_the_same(packed: Engine, llama: Served, tmp_path: Path, form: str) -> None:
    adapter = WrittenAdapter.random(llama.model, **FORMS[form])
    packed.free_memory()
    alone = packed.score(GROUPS, token_scores="all")
    packed.load_reading("policy", adapter.write(tmp_path))
    packed.free_memory()
    result = both(packed)
    np.testing.assert_array_equal(read(result, "frozen"), read(alone, "frozen"))
    found = deviations(result, plain_scores(adapter.merged()), "policy")
    assert {name: far for name, far in found.items() if not far <= BOUND} == {}
    packed.unload_reading("policy")


# ------------------------------------------------------------------------------------------------- the frozen model's numbers


@pytest.mark.parametrize("path", ["universal", "packed"])
def test_the_frozen_model_reads_the_same_bits_whatever_is_loaded(
    engine: Engine, packed: Engine, llama: Served, tmp_path: Path, path: str
) -> None:
    served = engine if path == "universal" else packed
    weights = {name: tensor.clone() for name, tensor in served._backbone._decoder.model.named_parameters() if not tensor.is_mkldnn}
    served.free_memory()
    once = [read(served.score(GROUPS, token_scores="all"), "frozen") for _ in range(2)]
    forms = [{}, {"use_dora": True}, {"r": 70, "layers_to_transform": [0]}]
    for number, form in enumerate(forms):
        served.load_reading(f"policy{number}", WrittenAdapter.random(llama.model, seed=number, **form).write(tmp_path / str(number)))
        both(served, f"policy{number}")
    served.unload_reading("policy1")
    served.free_memory()
    for asked in ((), ("frozen",), ("frozen", "policy0", "policy2")):
        served.free_memory()
        for before in once:
            again = served.score(GROUPS, token_scores="all", readings=asked)
            np.testing.assert_array_equal(read(again, "frozen"), before)
    for name, tensor in served._backbone._decoder.model.named_parameters():
        assert tensor.is_mkldnn or torch.equal(tensor, weights[name]), name
    for number in (0, 2):
        served.unload_reading(f"policy{number}")


def test_loading_never_takes_over_what_a_running_batch_reads(engine: Engine, llama: Served, tmp_path: Path) -> None:
    adapter = WrittenAdapter.random(llama.model, ["q_proj"]).write(tmp_path)
    decoder = engine._backbone._decoder
    width = 64
    buffer = torch.full((len(GROUPS), width), 7.0)
    from probescore.types import Tap

    with engine._backbone._reader.reading({Tap("resid_post", 1): buffer}):  # as while a batch runs
        engine.load_reading("policy", adapter)
        engine._readings.version(engine.readings()[1].id).backbone._decoder.model(input_ids=torch.zeros((1, len(GROUPS)), dtype=torch.long))
    assert bool((buffer == 7.0).all())
    assert all(not module._forward_hooks for module in decoder.model.modules())


def test_a_layer_with_a_bias_keeps_its_own(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "qwen2")  # biases beside queries, keys and values, which are prepacked
    engine = Engine.load(str(model), write_probes(tmp_path, model, ["last"]))
    for form in FORMS.values():
        adapter = WrittenAdapter.random(model, ["q_proj", "k_proj"], **form)
        engine.load_reading("policy", adapter.write(tmp_path / "adapter"))
        assert deviations(both(engine), plain_scores(adapter.merged(), ["last"]), "policy")["last"] <= BOUND


def test_an_engine_that_sleeps_loads_nothing(engine: Engine, llama: Served, tmp_path: Path) -> None:
    directory = WrittenAdapter.random(llama.model).write(tmp_path)
    engine.load_reading("policy", directory)
    before = read(both(engine), "policy")
    engine.sleep()
    try:
        with pytest.raises(RuntimeError, match="the engine sleeps"):
            engine.load_reading("other", directory)
    finally:
        engine.wake()
    np.testing.assert_array_equal(read(both(engine), "policy"), before)
