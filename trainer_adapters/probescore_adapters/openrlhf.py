"""Connects the trainer OpenRLHF with probes: ``AgentExecutor`` scores exact token ids (for ``--train.agent_func_path``), and
``RewardFunction`` scores text (for ``--reward.remote_url``).

Both are configured by the environment (``probescore_adapters.environment``), since OpenRLHF loads them by a file's path and gives them no
arguments. OpenRLHF requests the score of one sample at a time, so that a batch cannot be screened, and takes one number per sample, so that
no signal (rule from probe scores to rewards) can be dense (change the reward of each token).
"""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from openrlhf.utils.agent import SingleTurnAgentExecutor

from probescore import tokenizer_fingerprint
from probescore_adapters.environment import POLICY_ENV, TOKENIZER_FINGERPRINT, scorer_from_environment
from probescore_adapters.outcome import Outcome
from probescore_adapters.rollouts import Rollout
from probescore_adapters.signals import Mode

TASK_REWARD = "PROBESCORE_TASK_REWARD"
"""Name of the environment variable with the task's own reward function as ``module:function``: a ``reward_func(queries, prompts, labels)``
as OpenRLHF defines it, called with one sample at a time."""

HfTokenizer = Any  # of transformers, which is the trainer's
TaskReward = Callable[[Sequence[str], Sequence[str], Sequence[object]], dict[str, Any]]


class AgentExecutor(SingleTurnAgentExecutor):
    """OpenRLHF agent executor that generates samples like OpenRLHF's own executor, and adds rewards of probes that read exactly the
    generated token ids.

    The server must have the policy's tokenizer, unless ``PROBESCORE_TOKENIZER_FINGERPRINT`` says otherwise.

    Raises:
        ValueError: an environment variable is missing or wrong; the error names the variable. For a wrong signal (rule from probe scores to
            rewards) the error is a ``SignalError``.
        ProbescoreError: the server does not respond, and ``PROBESCORE_ON_FAILURE`` is not a number.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rewards = _RewardSources()
        self._expects_tokenizer = bool(os.environ.get(TOKENIZER_FINGERPRINT, ""))

    async def execute(
        self,
        prompt: str,
        label: object,
        sampling_params: object,
        max_length: int,
        hf_tokenizer: HfTokenizer,
        llm_engine: object,
        images: object = None,
    ) -> dict[str, Any]:
        """Generates one sample and scores it with probes; returns the sample with ``reward``, ``scores`` and ``extra_logs``.

        Raises:
            ProbescoreError, SignalError, Unscorable: the errors of ``ProbeScorer.score``, and all errors of the task's reward function. An
                error ends the run.
        """
        if not self._expects_tokenizer:
            self._rewards.scorer.require_tokenizer(tokenizer_fingerprint(hf_tokenizer))
            self._expects_tokenizer = True
        sample: dict[str, Any] = await super().execute(prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=images)
        ids = list(sample["observation_tokens"])
        ((start, end),) = sample["action_ranges"]
        query = hf_tokenizer.decode(ids, skip_special_tokens=False)
        task = await asyncio.to_thread(self._rewards.of_task, query, prompt, label)
        likely = sample.get("rollout_log_probs")
        logprob = None if likely is None else float(sum(likely[start:end]))
        rollout = Rollout(ids[:start], ids[start:end], logprob=logprob, columns={"prompt": prompt, "label": label, "query": query})
        outcome = await self._rewards.scorer.score_async([rollout], task)
        reward = float(outcome.rewards[0])
        return {**sample, "reward": reward, "scores": reward, "extra_logs": outcome.rollout_metrics}


class RewardFunction:
    """OpenRLHF ``reward_func`` on text, for runs that cannot use an agent. The server tokenises the text, which the metric ``inexact_ids``
    shows.

    A query that does not begin with its prompt gets no score, since the place where the response begins would be a guess.

    Raises:
        ValueError: an environment variable is missing or wrong, or ``PROBESCORE_ON_FAILURE`` is ``"raise"``: OpenRLHF catches the
            exceptions of a reward function, and continues without a reward.
        ProbescoreError: the server does not respond, and ``PROBESCORE_ON_FAILURE`` is not a number.
    """

    def __init__(self) -> None:
        self._rewards = _RewardSources()
        if self._rewards.scorer.policy.on_failure == "raise":
            raise ValueError(f"{POLICY_ENV['on_failure']}: OpenRLHF catches what a reward function raises: name a number, or 'wait'")

    def __call__(self, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[object]) -> dict[str, Any]:
        """Scores ``n`` samples given as text with probes, for the trainer OpenRLHF.

        Returns:
            A dictionary with ``rewards`` and ``scores``, each ``(n,)``, and ``extra_logs``, a dictionary of arrays ``(n,)``.
        """
        outcomes = [self._outcome(*sample) for sample in zip(queries, prompts, labels)]  # noqa: B905 - Python 3.10
        rewards = torch.tensor([float(outcome.rewards[0]) for outcome in outcomes])
        logs = {key: torch.tensor([outcome.rollout_metrics[key] for outcome in outcomes]) for key in outcomes[0].rollout_metrics}
        return {"rewards": rewards, "scores": rewards, "extra_logs": logs}

    def _outcome(self, query: str, prompt: str, label: object) -> Outcome:
        task = self._rewards.of_task(query, prompt, label)
        return self._rewards.scorer.score([Rollout.split(prompt, query)], task)


class _RewardSources:
    """The two sources of an OpenRLHF sample's reward: the scorer, which turns the scores of the server's probes into a number to add or
    subtract, and the reward function of the user's task. Both OpenRLHF adapters use it.
    """

    def __init__(self) -> None:
        written = os.environ.get(TASK_REWARD, "").strip()
        self._task_reward = _load(written) if written else None
        self.scorer = scorer_from_environment()
        self.scorer.refuse_modes(
            Mode.SCREEN,
            Mode.RELATIVE_GATE,
            Mode.DENSE,
            because="OpenRLHF has one sample scored at a time, and takes one number; take penalty or gate",
        )
        if self._task_reward is None:
            self.scorer.refuse_modes(Mode.GATE, because=f"there is no reward of the task to multiply; {TASK_REWARD} names it")
        # what does not go together is found while loading, which OpenRLHF lets fail
        self.scorer.score([], None if self._task_reward is None else [])

    def of_task(self, query: str, prompt: str, label: object) -> list[float] | None:
        """Returns the task's own reward of one sample, ``(1,)``, or ``None`` if only probes give rewards."""
        if self._task_reward is None:
            return None
        rewards = self._task_reward([query], [prompt], [label])["rewards"]
        return [float(torch.as_tensor(rewards).flatten()[0])]


def _load(written: str) -> TaskReward:
    module, _, function = written.partition(":")
    try:
        loaded: TaskReward = getattr(importlib.import_module(module), function)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(f"{TASK_REWARD}: expected module:function that can be imported, got {written!r}: {error}") from error
    return loaded
