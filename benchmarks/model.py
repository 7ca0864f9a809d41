"""The models that are measured, made from a config with random weights, and the linear probes on them; kept under ``build/bench``."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from probescore_probes import ReferenceModel, Tolerance, linear_probe, write_probe

FOLDER = Path("build/bench")


@dataclass(frozen=True)
class Shape:
    """A model of Qwen3's architecture; ``probed_layer`` is the block whose ``resid_post`` the probes read."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    probed_layer: int
    max_position_embeddings: int = 32_768
    tie_word_embeddings: bool = False

    def config(self) -> Qwen3Config:
        """As transformers takes it."""
        return Qwen3Config(**{name: value for name, value in asdict(self).items() if name != "probed_layer"})


SHAPES = {
    "tiny": Shape(512, 32, 64, 4, 4, 2, 8, probed_layer=2),
    "small": Shape(4_000, 256, 768, 4, 4, 2, 64, probed_layer=2),
    "125m": Shape(32_000, 768, 2048, 12, 12, 4, 64, probed_layer=6),
    "4b": Shape(151_936, 2560, 9728, 36, 32, 8, 128, probed_layer=18, tie_word_embeddings=True),
}


@dataclass(frozen=True)
class BenchModel:
    """A model on disk with its probes.

    Attributes:
        directory: as transformers loads it.
        probes: probe files, all on ``resid_post`` of block ``layer``.
        directions: the file with their weights, ``(probes, hidden_size)`` float32.
    """

    shape: Shape
    directory: Path
    probes: tuple[Path, ...]
    directions: Path
    layer: int


def make_model(shape: Shape, *, dtype: str = "float32", probes: int = 1, layer: int | None = None, folder: Path = FOLDER) -> BenchModel:
    """Makes a model and its probes, or finds those of an earlier run.

    Args:
        shape: of the model.
        dtype: of the weights on disk.
        probes: how many.
        layer: the block that they read; the shape's own by default. Not the last: what leaves it is in no ``hidden_states``.
        folder: where everything is kept.

    Raises:
        ValueError: there is no such block.
    """
    layer = shape.probed_layer if layer is None else layer
    if not 0 <= layer < shape.num_hidden_layers - 1:
        raise ValueError(f"layer {layer}: must be from 0 to {shape.num_hidden_layers - 2}")
    key = hashlib.sha256(json.dumps([asdict(shape), dtype], sort_keys=True).encode()).hexdigest()[:12]
    directory = folder / f"model-{key}"
    if not directory.exists():
        _write_model(shape, dtype, directory)
    files = directory.with_name(f"probes-{key}-{layer}-{probes}")
    if not files.exists():
        _write_probes(directory, layer, probes, files)
    return BenchModel(shape, directory, tuple(sorted(files.glob("*.onnx"))), files / "directions.npy", layer)


def write_adapter(model: PreTrainedModel, folder: Path, rank: int, seed: int) -> None:
    """Writes a LoRA adapter of random numbers on all linear layers of a model but its head, as PEFT writes them."""
    random, tensors = torch.Generator().manual_seed(seed), {}
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head]
    for name in names:
        out, inner = model.get_submodule(name).weight.shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn((rank, inner), generator=random) / inner**0.5
        tensors[f"base_model.model.{name}.lora_B.weight"] = 0.1 * torch.randn((out, rank), generator=random) / rank**0.5
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted({name.rpartition(".")[2] for name in names})}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def _write_model(shape: Shape, dtype: str, directory: Path) -> None:
    torch.manual_seed(0)
    unfinished = _emptied(directory.with_suffix(".unfinished"))
    AutoModelForCausalLM.from_config(shape.config(), dtype=getattr(torch, dtype)).save_pretrained(unfinished)
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(shape.vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(unfinished)
    unfinished.rename(directory)


def _write_probes(directory: Path, layer: int, count: int, files: Path) -> None:
    unfinished = _emptied(files.with_suffix(".unfinished"))
    random = np.random.default_rng(0)
    reference = ReferenceModel.load(directory, model_id="benchmark")
    vocab_size, width = reference.model.config.vocab_size, reference.reference.hidden_size
    tap = f"resid_post.{layer}"
    (rows,) = reference.completion_activations([_ids(random, vocab_size, (64, 512))], tap)
    directions = random.standard_normal((count, width))
    # scores of deviation 1, so that absolute differences read as relative ones
    directions = (directions / (rows @ directions.T).std(axis=0)[:, None]).astype(np.float32)
    golden = [_ids(random, vocab_size, (4, 4))]
    for index, direction in enumerate(track(directions, "writing probes", transient=True, disable=count < 100)):
        name = f"direction-{index:04}"
        write_probe(
            unfinished / f"{name}.onnx",
            linear_probe(direction),
            reference,
            name=name,
            version="1",
            taps=[tap],
            golden=golden,
            tolerance=Tolerance(),  # or it would be measured for each of them
        )
    np.save(unfinished / "directions.npy", directions)
    unfinished.rename(files)


def _ids(random: np.random.Generator, vocab_size: int, lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    prompt, completion = (random.integers(vocab_size, size=length).tolist() for length in lengths)
    return prompt, completion


def _emptied(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory
