"""Rollouts with pictures: ids that stand for what cannot be sent are refused by name, wherever they come."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from engine_probes import linear
from models import tiny_model, tiny_tokenizer
from parity_families import FAMILIES, PLACEHOLDER
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from probescore.types import Completion, RolloutGroup, Text
from probescore_probes.reference import ReferenceModel
from probescore_server import Engine
from probescore_server.backbone.media_placeholders import placeholder_tokens
from probescore_server.errors import InvalidRequest, ProbeRefused
from probescore_server.probes.format.manifest import FollowUp

OF_TEXT = re.compile(r"_?((forced_)?[be]os|eod|pad|unk|sep|cls|mask|user|decoder_start|begin_suppress)_(token_ids?|token_index)")
IMAGE, BEGIN, WORD = 40, 41, 42


@pytest.mark.parametrize("architecture", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
def test_every_architecture_that_sees_pictures_names_its_placeholders_so_that_they_are_found(architecture: str) -> None:
    try:
        config = AutoConfig.for_model(architecture)
    except ImportError as missing:
        pytest.skip(str(missing))
    found = placeholder_tokens(config, None)

    def ids(settings: dict[str, object]) -> set[int]:
        own = {value for name, value in settings.items() if re.search("_token_(id|index)$", str(name)) and not OF_TEXT.fullmatch(name)}
        return set().union(own - {None}, *(ids(value) for value in settings.values() if isinstance(value, dict)))

    assert ids(config.to_dict()) <= found.keys()
    assert not {config.to_dict().get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")} & found.keys() - {None}


@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if family.wrapper is not None], ids=lambda family: family.name)
def test_wrappers_name_theirs(family) -> None:
    config = CONFIG_MAPPING[family.architecture](**family.wrapper)
    assert re.fullmatch("image_token_(id|index)", placeholder_tokens(config, None)[PLACEHOLDER])


def test_the_tokenizer_of_a_wrapper_tells_of_what_its_config_does_not() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>", "<|video_pad|>", "[IMG_BREAK]", "<|tool|>"]})
    tokens = [tokenizer.convert_tokens_to_ids(name) for name in ("<image>", "<|video_pad|>", "[IMG_BREAK]")]
    wrapper = CONFIG_MAPPING["mistral3"](image_token_index=7)
    assert placeholder_tokens(wrapper, tokenizer) == {7: "image_token_index"} | dict(
        zip(tokens, ["<image>", "<|video_pad|>", "[IMG_BREAK]"], strict=True)
    )
    # such a token is a word to a model of text that shares the tokenizer
    assert placeholder_tokens(CONFIG_MAPPING["qwen3"](), tokenizer) == {}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    model = seeing(tmp_path_factory.mktemp("model"))
    file = linear().write(tmp_path_factory.mktemp("probe"), ReferenceModel.load(model))
    return Engine.load(str(model), [file])


def seeing(directory: Path) -> Path:
    model = Path(shutil.copytree(tiny_model(), directory / "model"))
    config = json.loads((model / "config.json").read_text())
    config |= {"image_token_index": IMAGE, "vision_config": {"boi_token_id": BEGIN}}
    (model / "config.json").write_text(json.dumps(config))
    return model


TEXT = [5, WORD]
GROUPS = {
    "groups[0].prompt.ids": (RolloutGroup([1, 5, IMAGE, 6], [TEXT]), 2, "image_token_index"),
    "groups[1].completions[1].ids": (RolloutGroup([1, 5], [TEXT, [5, BEGIN]]), 1, "boi_token_id"),
    "groups[0].completions[0].follow_ups[0].ids": (
        RolloutGroup([1], [Completion(TEXT, follow_ups=(Completion([IMAGE]),))]),
        0,
        "image_token_index",
    ),
    "groups[0].prompt": (RolloutGroup(Text("w7 w40 w9"), [TEXT]), 1, "image_token_index"),
    "groups[0].completions[0]": (RolloutGroup([1], [f"w{BEGIN}"]), 0, "boi_token_id"),
}


@pytest.mark.parametrize("field", GROUPS)
def test_they_are_refused_with_field_place_and_name(engine: Engine, field: str) -> None:
    group, place, name = GROUPS[field]
    before = [RolloutGroup([1], [TEXT])] * int(field[len("groups[")])
    with pytest.raises(
        InvalidRequest, match=rf"at index {place} is {name}: it stands for a picture.*send rollouts of text alone"
    ) as caught:
        engine.score([*before, group])
    assert (caught.value.field, caught.value.reason) == (field, "NOT_TEXT")


def test_rollouts_of_text_are_scored(engine: Engine) -> None:
    assert engine.info.placeholders == {IMAGE: "image_token_index", BEGIN: "boi_token_id"}
    assert engine.score([RolloutGroup([1, 5], [TEXT])]).values("linear")[0] is not None


def test_a_probe_that_appends_one_is_refused(tmp_path: Path) -> None:
    model = seeing(tmp_path)
    file = linear(follow_up=FollowUp(token_ids=(5, IMAGE))).write(tmp_path, ReferenceModel.load(model))
    with pytest.raises(ProbeRefused, match="40, image_token_index"):
        Engine.load(str(model), [file])
