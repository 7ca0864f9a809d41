"""Connects the trainer library TRL with probes: ``ProbeReward`` is a reward function; ``ProbeTrainerMixin`` also supports the signals
(rules from probe scores to rewards) that a reward function cannot implement.

Both work with ``GRPOTrainer`` and ``RLOOTrainer``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Union

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object

from probescore import Chat, Text, tokenizer_fingerprint
from probescore_adapters.outcome import PREFIX, Outcome
from probescore_adapters.rollouts import Prompt, Rollout
from probescore_adapters.scorer import ProbeScorer
from probescore_adapters.signals import Floats, Mode

# the standard library's: a trainer's process has its own way of showing logs
logger = logging.getLogger("probescore_adapters")

LogMetric = Callable[[str, float], None]
LogExtra = Callable[[str, list[float]], None]
Message = Mapping[str, str]


def _trl_is_at_least(*wanted: int) -> bool:
    return tuple(int(part) for part in version("trl").split(".")[:2]) >= wanted


# until then TRL awaits no reward function, and puts no special tokens in front of a prompt of plain text
_IS_ASYNC = _trl_is_at_least(0, 27)
_HAS_MIXIN = _trl_is_at_least(1, 10)


async def probe_reward(
    scorer: ProbeScorer,
    /,  # a data set may have a column of that name
    *,
    prompts: Sequence[Union[str, Sequence[Message]]],
    completion_ids: Sequence[Sequence[int]],
    completions: Sequence[Union[str, Sequence[Message]]] | None = None,
    exact_prompt_ids: Sequence[Sequence[int]] | None = None,
    trainer_state: Any = None,  # noqa: ANN401 - of transformers, or of the user
    log_metric: LogMetric | None = None,
    log_extra: LogExtra | None = None,
    **columns: object,
) -> list[float]:
    """Returns the numbers that the signals (rules from probe scores to rewards) add to the rewards of ``n`` rollouts, with the signature of
    TRL's reward functions; ``ProbeReward`` is this function bound to a scorer.

    Args:
        scorer: the scorer, with its signals and the server's address.
        prompts: ``n`` prompts as text or messages, which the server tokenises.
        completion_ids: ``n`` completions, token ids ``(T,)`` each.
        completions: ``n`` texts or messages that TRL's tokenizer decoded from the ids; they show whether the server has another tokenizer.
        exact_prompt_ids: ``n`` prompts as token ids ``(P,)`` each, used instead of ``prompts``; they come from a column of the data set, or
            from an additional field of a ``rollout_func``.
        trainer_state: TRL's state of the trainer, whose ``global_step`` is sent for the server's logs, and recorded.
        log_metric: TRL's function that logs a metric, given a name and a number; without it (TRL < 1) the metrics go to the logger
            ``probescore_adapters``.
        log_extra: TRL's function that logs a column, given a name and ``n`` numbers.
        columns: the columns of the data set, ``n`` values each, which a checker that labels for the record may read.

    Raises:
        ProbescoreError, SignalError, Unscorable: the errors of ``ProbeScorer.score``.
    """
    rollouts = _rollouts(prompts, completion_ids, exact_prompt_ids, completions, columns)
    step = _step(scorer, trainer_state)
    texts, is_training = _texts(prompts, completions), _is_training(log_metric)
    outcome = await scorer.score_async(rollouts, step=step, texts=texts, record=is_training)
    return _reported(outcome, log_metric, log_extra)


def synchronous_probe_reward(
    scorer: ProbeScorer,
    /,
    *,
    prompts: Sequence[Union[str, Sequence[Message]]],
    completion_ids: Sequence[Sequence[int]],
    completions: Sequence[Union[str, Sequence[Message]]] | None = None,
    exact_prompt_ids: Sequence[Sequence[int]] | None = None,
    trainer_state: Any = None,  # noqa: ANN401 - of transformers, or of the user
    **columns: object,
) -> list[float]:
    """Returns the numbers that the signals (rules from probe scores to rewards) add to the rewards of ``n`` rollouts, for TRL versions that
    do not await reward functions; arguments and errors are the same as for ``probe_reward``.
    """
    rollouts = _rollouts(prompts, completion_ids, exact_prompt_ids, completions, columns)
    outcome = scorer.score(rollouts, step=_step(scorer, trainer_state), texts=_texts(prompts, completions))
    return _reported(outcome, None, None)


class ProbeReward(functools.partial):  # type: ignore[type-arg] # not a generic type to a subclass at run time
    """Reward function for TRL: ``GRPOTrainer(reward_funcs=[task_reward, ProbeReward(scorer)], …)``.

    The function is ``async`` if this version of TRL awaits reward functions, so that it runs concurrently with other reward functions. The
    class derives from ``functools.partial``, because TRL inspects the function inside a ``partial``, while not every version inspects other
    callable objects. A ``ProbeReward`` can be pickled. Each rank scores its own rollouts.

    The server must have the trainer's tokenizer. With ``processing_class`` the fingerprints of the two tokenizers are compared before
    anything is scored. Without it the texts that both tokenizers decode from the first completions' ids are compared, since TRL passes no
    tokenizer to a reward function.

    Args:
        scorer: the scorer; its signals (rules from probe scores to rewards) must have the modes ``reward``, ``penalty`` or ``monitor``.
        processing_class: the trainer's tokenizer, or a processor with a tokenizer.

    Raises:
        SignalError: a signal has another mode; a reward function cannot see task rewards, and cannot remove a rollout.
    """

    __name__ = "probe_reward"

    def __new__(cls, scorer: ProbeScorer, processing_class: Any = None) -> ProbeReward:  # noqa: ANN401 - of transformers
        """Makes a reward function for the trainer library TRL from the probe scores of a ``ProbeScorer``."""
        refused = (Mode.SCREEN, Mode.GATE, Mode.RELATIVE_GATE, Mode.DENSE)
        scorer.refuse_modes(*refused, because="a reward function only adds; use ProbeTrainerMixin")
        if processing_class is not None:
            scorer.require_tokenizer(tokenizer_fingerprint(getattr(processing_class, "tokenizer", processing_class)))
        return super().__new__(cls, probe_reward if _IS_ASYNC else synchronous_probe_reward, scorer)

    @property
    def scorer(self) -> ProbeScorer:
        """Returns the ``ProbeScorer`` whose scores this reward function uses."""
        scorer: ProbeScorer = self.args[0]
        return scorer

    def __reduce__(self) -> tuple[type[ProbeReward], tuple[ProbeScorer]]:
        return type(self), (self.scorer,)


class ProbeTrainerMixin:
    """Mixin that makes a TRL trainer support every mode of a signal, on exact token ids: ``class Trainer(ProbeTrainerMixin, GRPOTrainer)``,
    made with ``probes=scorer``.

    Task rewards are TRL's ``reward_funcs`` with their weights; the change that the signals (rules from probe scores to rewards) make to the
    task rewards appears in TRL's logs as one more reward function, ``probescore``. Prompts are scored as they were tokenised for
    generation, and tokens of tools do not count. A removed rollout counts neither in its group's mean and standard deviation nor in the
    loss. A rollout to which no task function gives a reward has no advantage, as without probes. The numbers of ``dense`` signals are added
    to the advantages of their tokens without normalisation.

    Rank 0 scores the rollouts of all ranks at once, since guard rails need whole groups, and sends the result to the other ranks. The
    server must have the trainer's tokenizer.

    Args:
        args: positional arguments of the trainer.
        probes: the ``ProbeScorer``; with RLOO, whose loss has one number per rollout, no signal may be ``dense``.
        kwargs: keyword arguments of the trainer; ``reward_funcs`` must not be empty.

    Raises:
        SignalError: a signal's mode is ``dense``, and the trainer is RLOO.
        ValueError: ``reward_funcs`` is empty.
        ImportError: the installed TRL is older than 1.10.
    """

    def __init__(self, *args: Any, probes: ProbeScorer, **kwargs: Any) -> None:  # noqa: ANN401 - the trainer's
        if not _HAS_MIXIN:
            raise ImportError(
                f"ProbeTrainerMixin needs TRL 1.10 or later, which leaves out rollouts without a reward; this is {version('trl')}"
            )
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if not trainer.reward_funcs:
            raise ValueError("reward_funcs: ProbeTrainerMixin acts on task rewards, and there are none; use ProbeReward")
        if _is_rloo(trainer):
            probes.refuse_modes(Mode.DENSE, because="RLOO has one advantage for a whole rollout")
        probes.require_tokenizer(tokenizer_fingerprint(trainer._tokenizer))
        self._probes = probes
        if probes.recorder is not None:
            probes.recorder.score_for_all_ranks()
        self._outcome: Outcome
        trainer.reward_funcs.append(_no_reward)
        trainer.reward_func_names.append(PREFIX)
        trainer.reward_processing_classes.append(None)
        trainer.reward_weights = torch.cat([trainer.reward_weights, trainer.reward_weights.new_ones(1)])

    def _generate(self, prompts: list[Any]) -> Any:  # noqa: ANN401 - the trainer's
        generated = super()._generate(prompts)  # type: ignore[misc] # of the trainer
        self._prompt_ids = generated[0]
        # GRPO has a mask of what came from no tool; RLOO knows no tools
        self._masks = generated[2] if len(generated) > 3 else None
        # of what an inference engine has sampled
        self._logprobs = generated[4] if len(generated) > 4 else None
        return generated

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[Any], completions: list[Any], completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        trainer: Any = self
        rewards: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # type: ignore[misc] # of the trainer
        tasks = (rewards * trainer.reward_weights.to(rewards.device)).nansum(dim=1).double().cpu().numpy()
        masks = self._masks or [None] * len(completion_ids_list)
        logprobs = [None if of is None else float(np.sum(of)) for of in self._logprobs or [None] * len(masks)]
        checks = self._probes.recorder is not None and self._probes.recorder.options.checker is not None
        local = [
            # columns may be images, and go to rank 0
            Rollout(prompt, ids, mask, logprob=logprob, columns={**row, "completion": completion} if checks else None)
            for prompt, ids, mask, logprob, row, completion in zip(
                self._prompt_ids, completion_ids_list, masks, logprobs, inputs, completions, strict=True
            )
        ]
        outcome = self._scored(local, tasks)
        self._outcome = outcome

        for name, value in outcome.metrics.items():
            trainer._log_metric(name, value)
        for name, values in outcome.values.items():
            trainer._log_completion_extra(f"{PREFIX}/{name}", values[self._of_this_rank(len(local))].tolist())
        unrewarded = rewards.isnan().all(dim=1)
        rewards[:, -1] = torch.from_numpy(outcome.rewards - tasks)
        # TRL leaves a row out in which every reward is missing
        rewards[unrewarded | torch.from_numpy(outcome.removed).to(rewards.device)] = torch.nan
        return rewards

    def _generate_and_score_completions(self, inputs: list[Any]) -> dict[str, Any]:
        trainer: Any = self
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc] # of the trainer
        outcome, here = self._outcome, self._of_this_rank(len(inputs))
        completion_mask = output["completion_mask"]
        if outcome.removed.any():
            kept = torch.from_numpy(~outcome.removed[here]).to(completion_mask)
            if _is_rloo(trainer):
                output["completion_mask"] = completion_mask * kept[:, None]
                output["old_logps"] = output["old_logps"] * kept  # of no token, as the new ones will be
            else:
                # the loss leaves these tokens out, and attention does not, so that log-probabilities stay what they were
                output["tool_mask"] = output.get("tool_mask", torch.ones_like(completion_mask)) * kept[:, None]
                counted = (completion_mask * output["tool_mask"]).sum()
                output["num_items_in_batch"] = trainer.accelerator.gather(counted).sum()
        if outcome.dense is not None:
            dense = _padded(outcome.dense[here], completion_mask.shape[1])
            output["advantages"] = output["advantages"][:, None] + dense.to(output["advantages"])
        return output

    def _of_this_rank(self, count: int) -> slice:
        """Returns the slice that this process's ``count`` rollouts have within the rollouts of all ranks."""
        trainer: Any = self
        start = trainer.accelerator.process_index * count
        return slice(start, start + count)

    def _scored(self, local: list[Rollout], tasks: Floats) -> Outcome:
        """Scores the rollouts of all ranks with probes, on rank 0, and returns all their rewards and metrics on each rank."""
        trainer: Any = self
        size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        everywhere = gather_object(local)
        answer: list[Outcome | Exception | None] = [None]
        if trainer.accelerator.is_main_process:
            rollouts = [replace(one, group=index // size) for index, one in enumerate(everywhere)]
            try:
                step = _step(self._probes, trainer.state)
                answer = [self._probes.score(rollouts, tasks, step=step, record=trainer.model.training)]
            except Exception as error:  # raised below, on every rank: the others wait for this one
                answer = [error]
        (result,) = broadcast_object_list(answer)
        if not isinstance(result, Outcome):
            raise result
        return result


def _no_reward(prompts: list[Any], **_columns: object) -> list[None]:
    """Reward function that returns no rewards: it reserves the column of TRL's rewards that ``ProbeTrainerMixin`` fills once the task
    rewards are known.
    """
    return [None] * len(prompts)


def _is_rloo(trainer: object) -> bool:
    from trl import RLOOTrainer  # a trainer to whom rewards alone matter need not load it

    return isinstance(trainer, RLOOTrainer)


def _rollouts(
    prompts: Sequence[Union[str, Sequence[Message]]],
    completion_ids: Sequence[Sequence[int]],
    exact_prompt_ids: Sequence[Sequence[int]] | None,
    completions: Sequence[Union[str, Sequence[Message]]] | None,
    columns: Mapping[str, object],
) -> list[Rollout]:
    asked: list[Prompt] = [_as_tokenised(prompt) for prompt in prompts] if exact_prompt_ids is None else list(exact_prompt_ids)
    whole = {"prompt": prompts, **({} if completions is None else {"completion": completions}), **columns}
    known = {name: column for name, column in whole.items() if isinstance(column, Sequence) and len(column) == len(asked)}
    return [
        Rollout(*parts, columns={name: column[index] for name, column in known.items()})
        for index, parts in enumerate(zip(asked, completion_ids, strict=True))
    ]


def _step(scorer: ProbeScorer, trainer_state: Any) -> int | None:  # noqa: ANN401 - of transformers, or of the user
    """Returns the training step that TRL's state of the trainer says, and tells the record how many there will be."""
    if scorer.recorder is not None:
        scorer.recorder.plan_steps(getattr(trainer_state, "max_steps", 0))
    step: int | None = getattr(trainer_state, "global_step", None)
    return step


def _is_training(log_metric: LogMetric | None) -> bool:
    """Returns whether TRL scores rollouts that it trains on, and not those of an evaluation: the function that it gives for logging is its
    trainer's.
    """
    model = getattr(getattr(log_metric, "__self__", None), "model", None)
    return bool(getattr(model, "training", True))


def _texts(
    prompts: Sequence[Union[str, Sequence[Message]]], completions: Sequence[Union[str, Sequence[Message]]] | None
) -> list[str | None] | None:
    """Returns the text decoded from each completion's ids; ``None`` for a completion whose text TRL has changed since, for example by
    parsing tool calls.
    """
    if completions is None:
        return None
    # where the prompt ends with the beginning of an answer, TRL puts that in front of the completion's text
    return [
        None if not isinstance(prompt, str) and prompt and prompt[-1]["role"] == "assistant" else _text(completion)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _text(completion: str | Sequence[Message]) -> str | None:
    if isinstance(completion, str):
        return completion
    # several messages come of tools, and further keys of a parser: these say something else than the ids
    if len(completion) == 1 and set(completion[0]) == {"role", "content"} and isinstance(completion[0]["content"], str):
        return completion[0]["content"]
    return None


def _as_tokenised(prompt: str | Sequence[Message]) -> Text | Chat:
    """Returns a prompt as text or chat, such that the server tokenises the prompt in the same way as TRL."""
    return Text(prompt, add_special_tokens=_IS_ASYNC) if isinstance(prompt, str) else Chat.of(prompt)


def _reported(outcome: Outcome, log_metric: LogMetric | None, log_extra: LogExtra | None) -> list[float]:
    """Logs the metrics and the probe scores of a batch, and returns the numbers to add to the batch's rewards."""
    if log_metric is None:
        logger.info("%s", ", ".join(f"{name} {value:g}" for name, value in outcome.metrics.items()))
    else:
        for name, value in outcome.metrics.items():
            log_metric(name, value)
    if log_extra is not None:
        for name, values in outcome.values.items():
            log_extra(f"{PREFIX}/{name}", values.tolist())
    rewards: list[float] = outcome.rewards.tolist()
    return rewards


def _padded(rows: Sequence[Floats], width: int) -> torch.Tensor:
    """Returns rows of numbers of different lengths as one tensor ``(n, width)``, padded with 0 at the end."""
    padded = np.zeros((len(rows), width))
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(padded)
