"""Lets probes read the policy that TRL, or another trainer built on transformers, trains: ``ReadingCallback`` saves its weights every so
many steps, and has the server load them as a reading.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list, extract_model_from_parallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from probescore_adapters.policy_readings import PolicyReading
from probescore_adapters.scorer import ProbeScorer


class ReadingCallback(TrainerCallback):
    """Callback that has the server read the policy as it is trained: ``GRPOTrainer(..., callbacks=[ReadingCallback(scorer)])``.

    Before the first step and after every ``every`` steps rank 0 saves the policy's LoRA adapter, or all its weights if it is trained
    without one, and the servers load them as the reading ``name``; the other ranks wait meanwhile. So all rollouts of a step are read by
    one version, on all ranks, and its step is the metric ``reading_step``. The weights are saved to a directory of their own each time,
    and the oldest ones are deleted, except for the last ``keep``: a server that restarts reads the last one again.

    With ``every=None`` the callback saves nothing, and the servers load the checkpoints that the trainer itself saves, also those of a
    policy that is sharded over ranks (FSDP, DeepSpeed ZeRO-3). Then it deletes nothing, and the reading is there from the first checkpoint
    on.

    If saving or loading fails, the run goes on or ends as ``PolicyReading`` says; an error is raised on every rank.

    Args:
        scorer: the scorer whose signals (rules from probe scores to rewards) read the policy; its servers load the weights.
        directory: directory on storage that the servers see, for the weights that the callback saves; ``None`` = the trainer's
            ``output_dir``.
        every: number of steps between two loads; ``None`` = whenever the trainer saves a checkpoint.
        name: name of the reading.
        keep: number of directories of saved weights that are kept.
        server_directory: the same directory as the servers name it, absolute or relative to their ``readings_root``; ``None`` = its
            absolute path here.

    Raises:
        ValueError: ``every`` or ``keep`` is less than 1, ``every`` is ``None`` and there is a ``directory``, or no signal of the scorer has
            the reading ``name``.
    """

    def __init__(
        self,
        scorer: ProbeScorer,
        directory: str | os.PathLike[str] | None = None,
        *,
        every: int | None = 50,
        name: str = "policy",
        keep: int = 2,
        server_directory: str | os.PathLike[str] | None = None,
    ) -> None:
        for field, value in (("every", every), ("keep", keep)):
            if (field, value) != ("every", None) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{field}: expected a whole number of at least 1, got {value!r}")
        if every is None and directory is not None:
            raise ValueError(
                f"directory: the trainer's checkpoints are in its output_dir, got {directory!r} and every=None; give one of them"
            )
        self._reading = PolicyReading(scorer, name)
        self._directory = directory
        self._server_directory = server_directory
        self._every = every
        self._keep = keep
        self._saved: list[Path] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: ANN401
        """Loads the policy as it is before the first step, so that the first rollouts are read, too."""
        del control
        if self._every is not None:
            self._load_policy(args, state.global_step, kwargs["model"], kwargs.get("processing_class"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: ANN401
        """Loads the policy after every ``every``-th step."""
        del control
        if self._every is not None and state.global_step % self._every == 0:
            self._load_policy(args, state.global_step, kwargs["model"], kwargs.get("processing_class"))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: ANN401
        """Loads the checkpoint that the trainer has saved, with ``every=None``."""
        del control, kwargs
        if self._every is None:
            self._on_rank_0(lambda: self._load(self._folder(args), Path(f"checkpoint-{state.global_step}"), state.global_step))

    def _folder(self, args: TrainingArguments) -> Path:
        return Path(self._directory or args.output_dir or ".").absolute()

    def _load_policy(self, args: TrainingArguments, step: int, model: Any, tokenizer: Any) -> None:  # noqa: ANN401 - of transformers
        if PartialState().distributed_type is DistributedType.FSDP or is_deepspeed_zero3_enabled():
            remedy = "take every=None, and have the trainer save whole weights (FULL_STATE_DICT, stage3_gather_16bit_weights_on_model_save)"
            raise ValueError(f"every: the policy is sharded over the ranks (FSDP, DeepSpeed ZeRO-3), and rank 0 has a part only: {remedy}")
        policy = extract_model_from_parallel(model, keep_torch_compile=False)
        self._on_rank_0(lambda: self._save_and_load(self._folder(args), step, policy, tokenizer))

    def _on_rank_0(self, load: Callable[[], None]) -> None:
        """Calls a function on rank 0, for which the other ranks wait, and handles its error on all of them."""
        failed: list[Exception | None] = [None]
        if PartialState().is_main_process:
            try:
                load()
            except Exception as raised:  # raised below, on every rank: the others wait for this one
                failed = [raised]
        (error,) = broadcast_object_list(failed)
        self._reading.settle(error)

    def _save_and_load(self, folder: Path, step: int, policy: Any, tokenizer: Any) -> None:  # noqa: ANN401 - of transformers
        """Saves the policy's weights to a directory of their own, has the servers load them, and deletes those of earlier steps."""
        saved = folder / f"{self._reading.name}-step-{step}"
        partial = saved.with_name(f"{saved.name}.partial")  # so that under its own name it is whole
        for former in (partial, saved):
            shutil.rmtree(former, ignore_errors=True)
        try:
            within = _save(policy, tokenizer, partial)
            partial.rename(saved)
            self._load(folder, Path(saved.name, within), step)
        except Exception:
            for former in (partial, saved):
                shutil.rmtree(former, ignore_errors=True)
            raise
        self._saved = [*(former for former in self._saved if former != saved), saved]
        while len(self._saved) > self._keep:
            shutil.rmtree(self._saved.pop(0), ignore_errors=True)

    def _load(self, folder: Path, saved: Path, step: int) -> None:
        seen = folder if self._server_directory is None else Path(self._server_directory)
        self._reading.load(seen / saved, step)


def _save(policy: Any, tokenizer: Any, folder: Path) -> str:  # noqa: ANN401 - of transformers
    """Saves a policy's adapter, or all its weights if it has none, and returns where within the directory the files are."""
    peft = sys.modules.get("peft")  # who trains no adapter need not have it
    if peft is None or not isinstance(policy, peft.PeftModel):
        policy.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return ""
    # beside the adapter that is trained there may be the one of a reference policy
    adapter: str = policy.active_adapter
    policy.save_pretrained(folder, selected_adapters=[adapter])
    return "" if adapter == "default" else adapter
