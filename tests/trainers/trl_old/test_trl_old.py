"""TRL 0.24, which awaits nothing and passes neither ``log_metric`` nor ``log_extra``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from plain_forward import TOLERANCE, Probed
from running_server import RunningServer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from probescore_adapters import ProbeScorer, ProbeSignal
from probescore_adapters.trl import ProbeReward, ProbeTrainerMixin

STEPS, BATCH = 3, 4


class RecordedTrainer(GRPOTrainer):
    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Any:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        self.rewards.append(rewards[:, -1].numpy())
        ids = self.processing_class(prompts, add_special_tokens=False)["input_ids"]
        self.generated += zip(ids, completion_ids, strict=True)
        return rewards


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def tokenizer_of(model: Path) -> PreTrainedTokenizerFast:
    """From its own file: this version of transformers does not read a newer one's settings."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(model / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )


def test_a_reward_function_gives_what_a_plain_forward_gives_and_logs_its_metrics(
    probed: Probed, served: RunningServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reward = ProbeReward(ProbeScorer(ProbeSignal("cheating", mode="reward"), served.address))
    trainer = RecordedTrainer(
        model=AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(probed.model)),
        processing_class=tokenizer_of(probed.model),
        reward_funcs=[lengths, reward],
        train_dataset=Dataset.from_dict({"prompt": ["<s> w5 w6 w7", "<s> w8 w9"] * 4}),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            num_generations=4,
            max_completion_length=8,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
        ),
    )
    trainer.rewards, trainer.generated = [], []
    with caplog.at_level(logging.INFO, "probescore_adapters"):
        trainer.train()
    found = np.concatenate(trainer.rewards)
    expected = np.array([scores.mean() for scores in probed.scores(trainer.generated)])
    assert len(found) == STEPS * BATCH
    assert np.abs(found - expected).max() <= TOLERANCE * expected.std()
    assert sum("probescore/cheating/mean" in record.getMessage() for record in caplog.records) == STEPS


def test_the_mixin_says_that_it_needs_a_newer_trl() -> None:
    class Trainer(ProbeTrainerMixin, GRPOTrainer):
        pass

    with pytest.raises(ImportError, match=r"needs TRL 1\.10 or later"):
        Trainer(probes=ProbeScorer(ProbeSignal("cheating")))
