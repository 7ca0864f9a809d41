"""Lets probes read the policy that verl trains: ``ReadingCheckpointCallback`` has the server load each checkpoint that verl saves.

Name it in verl's setting ``trainer.checkpoint_callback_class``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback

from probescore.types import FROZEN
from probescore_adapters.policy_readings import PolicyReading
from probescore_adapters.verl import scorer_from_config


class ReadingCheckpointCallback(CheckpointCallback):
    """Callback of the trainer verl that has the server load the weights of each checkpoint as a reading: the one that the signals (rules
    from probe scores to rewards) of ``reward.reward_kwargs.probescore`` read beside the frozen model.

    verl must save the weights as Hugging Face reads them: ``actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,
    hf_model]``, or, for a LoRA adapter, the directory ``lora_adapter`` that verl's model merger writes. The server must see the checkpoints
    under the same path.

    Args:
        config: verl's configuration.

    Raises:
        ValueError: the signals read no other weights than the frozen model's, or several.
    """

    def __init__(self, config: DictConfig) -> None:
        super().__init__(config=config)
        scorer = scorer_from_config(config, "")
        names = list(dict.fromkeys(signal.reading for signal in scorer.signals if signal.reading != FROZEN))
        if len(names) != 1:
            raise ValueError(f"signals: they read {', '.join(names) or 'the frozen model only'}; the policy is one reading beside it")
        self._reading = PolicyReading(scorer, names[0])

    def on_save(self, trainer: object, global_step: int, checkpoint_dir: str, async_save: bool = False, **kwargs: Any) -> None:  # noqa: ANN401
        """Loads a checkpoint that verl has saved.

        Raises:
            ProbescoreError, FileNotFoundError: the checkpoint was not loaded, and ``on_failure`` lets the run not go on.
            ValueError: verl saves asynchronously, so that nobody knows when a checkpoint is whole.
        """
        del trainer, kwargs
        if async_save:
            raise ValueError(
                "actor_rollout_ref.actor.checkpoint.async_save: a checkpoint that is still being written is not loaded; turn it off"
            )
        error: Exception | None = None
        try:
            self._reading.load(_exported(Path(checkpoint_dir).absolute() / "actor"), global_step)
        except Exception as raised:
            error = raised
        self._reading.settle(error)


def _exported(actor: Path) -> Path:
    """Returns the directory of a checkpoint of verl's that holds an adapter or whole weights as Hugging Face writes them."""
    for folder in (actor / "lora_adapter", actor / "huggingface"):
        if any(folder.glob("*.safetensors")):
            return folder
    remedy = "have verl save them: actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]"
    raise FileNotFoundError(f"{actor.parent.name}: neither actor/lora_adapter nor actor/huggingface has weights; {remedy}")
