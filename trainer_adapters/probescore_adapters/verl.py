"""Connects the trainer verl with probes: provides ``ProbeRewardManager``, which is named in verl's setting ``reward.reward_manager``.

verl requests the reward of one rollout at a time, in the workers of its reward loop, and passes exact token ids.
"""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from verl import DataProto
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager

from probescore.fingerprints import Tokenizer, tokenizer_fingerprint
from probescore_adapters.arrays import as_mask
from probescore_adapters.environment import TOKENIZER_FINGERPRINT, rails_from, record_from, scorer_from_environment, signals_from
from probescore_adapters.outcome import Outcome
from probescore_adapters.rollouts import Rollout
from probescore_adapters.scorer import Policy, ProbeScorer
from probescore_adapters.signals import Floats, Mode

RESPONSE_MASK = "probescore_response_mask"
"""Name of the field of an agent loop's output in which ``verl_agent_loop`` passes on the response mask, which verl itself does not pass
on."""


class TokenRewards(float):
    """The reward of a rollout as a ``float`` that also stores the reward of each token.

    The value of the ``float`` is the sum of the tokens' rewards, so that parts of verl that know only one reward per rollout use the
    correct total.

    Attributes:
        tokens: ``(T,)`` float64, the rewards of the tokens, whose sum is the reward of the rollout.
    """

    tokens: Floats

    def __new__(cls, tokens: Floats) -> TokenRewards:
        """Makes a ``float`` that is the sum of the rewards of a rollout's tokens ``(T,)``, and also stores these rewards."""
        rewards = super().__new__(cls, float(tokens.sum()))
        rewards.tokens = tokens
        return rewards

    def __reduce__(self) -> tuple[type[TokenRewards], tuple[Floats]]:
        return TokenRewards, (self.tokens,)


class ProbeRewardManager(NaiveRewardManager):
    """Reward manager for verl that returns the results of verl's own ``naive`` manager, changed by the signals (rules from probe scores to
    rewards) of probes.

    The setting ``reward.reward_kwargs.probescore`` contains the arguments of ``ProbeScorer``: ``signals`` is a list of dictionaries with
    the fields of ``ProbeSignal``, ``rails`` a dictionary with the fields of ``GuardRails``, and ``record`` a folder or a dictionary with
    the fields of ``RecordOptions``; the fields of ``Policy`` stand beside them. Without this setting the scorer is configured by
    environment variables: ``scorer_from_environment``. The server must have the policy's tokenizer, unless ``tokenizer_fingerprint`` is set
    to the fingerprint of another tokenizer, or to "" for any tokenizer.

    Raises:
        SignalError: a signal's mode is ``screen``; with one rollout at a time, the guard rails cannot limit the share of removed rollouts.
        TypeError, ValueError: another setting is wrong.
    """

    def __init__(
        self,
        config: DictConfig,
        tokenizer: Tokenizer,
        compute_score: Callable[..., Any] | None,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(config, tokenizer, compute_score, reward_router_address, reward_model_tokenizer)
        self.scorer = scorer_from_config(config, tokenizer_fingerprint(tokenizer))

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that runs now. The trainer verl's own reward managers store the event loop in which they are made, which may be
        another one.
        """
        return asyncio.get_running_loop()

    @loop.setter
    def loop(self, made_in: asyncio.AbstractEventLoop) -> None:
        del made_in

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """Scores one rollout with the task's own score and with the signals (rules from probe scores to rewards) of probes.

        Returns:
            A dictionary with two entries. ``reward_score`` is the reward, a number; if a signal is dense (gives each token a reward), it is
            a ``TokenRewards``. ``reward_extra_info`` contains the additional information of the task's score, and the metrics of the
            signals, always with the same keys, NaN for a metric without data.

        Raises:
            ProbescoreError, SignalError, Unscorable, ValueError: the errors of ``ProbeScorer.score``, and all errors of the task's score
                function.
        """
        task = await super().run_single(data)
        tasks = np.array([task["reward_score"]], np.float64)
        outcome = await self.scorer.score_async([rollout_of(data)], tasks, step=step_of(data))
        return {"reward_score": _reward(outcome), "reward_extra_info": {**task["reward_extra_info"], **outcome.rollout_metrics}}

    @classmethod
    def assemble_rm_scores(cls, data: DataProto, scores: Sequence[float]) -> Any:  # noqa: ANN401 - a tensor, without importing torch
        """Returns a batch's rewards per token, verl's ``rm_scores`` ``(n, T)``: a rollout's reward stands at its last token, or each
        token's own reward at that token.
        """
        rm_scores = super().assemble_rm_scores(data, [float(score) for score in scores])
        for row, score in zip(rm_scores, scores, strict=True):
            if isinstance(score, TokenRewards):
                row[:] = 0
                row[: len(score.tokens)] = row.new_tensor(score.tokens)
        return rm_scores


def rollout_of(data: DataProto) -> Rollout:
    """Returns the rollout to score of those that the trainer verl passes to a reward manager: the last one, which verl's own reward
    managers also score.
    """
    item = data[-1:][0]
    batch, extra = item.batch, item.non_tensor_batch
    prompts, responses, attends = (batch[name].cpu().numpy() for name in ("prompts", "responses", "attention_mask"))
    if "prompt_len" in extra:
        # The outputs of one agent loop are padded to a common length after prompt and response were joined: the mask is of neither.
        in_prompt = np.arange(len(prompts)) < extra["prompt_len"]
        in_response = np.arange(len(responses)) < extra["response_len"]
    else:
        in_prompt, in_response = np.split(as_mask(attends, len(prompts) + len(responses), "attention_mask"), [len(prompts)])
    mask = batch["response_mask"].cpu().numpy()[in_response] if "response_mask" in batch.keys() else None  # noqa: SIM118 - a TensorDict
    if mask is None:
        mask = (extra.get("tool_extra_fields") or {}).get(RESPONSE_MASK)
    if mask is None and (extra.get("__num_turns__") or 0) > 2:
        warnings.warn("a rollout of several turns came without its response mask: tool output counts; see verl_agent_loop", stacklevel=2)
    columns = {name: value for name, value in extra.items() if not name.startswith("__")}
    return Rollout(prompts[in_prompt], responses[in_response], mask, columns=columns)


def step_of(data: DataProto) -> int | None:
    """Returns the training step of the rollouts that the trainer verl passes to a reward manager; ``None`` if it does not say."""
    step = data[-1:][0].non_tensor_batch.get("global_steps")
    return int(step) if step is not None and int(step) >= 0 else None


def scorer_from_config(config: DictConfig, fingerprint: str) -> ProbeScorer:
    """Returns the ``ProbeScorer`` (which turns probe scores into rewards) that verl's setting ``reward.reward_kwargs.probescore`` or the
    environment describes.

    Args:
        config: verl's configuration.
        fingerprint: fingerprint of the tokenizer that the server must have, unless the settings name another; "" = any.

    Raises:
        SignalError: a signal's mode is ``screen``.
        TypeError, ValueError: another setting is wrong.
    """
    written = OmegaConf.create((config.reward.get("reward_kwargs") or {}).get("probescore") or {})
    settings: Mapping[str, Any] = OmegaConf.to_container(written, resolve=True)
    if settings:
        rest = {"tokenizer_fingerprint": fingerprint, **settings}
        policy = Policy(**{field.name: rest.pop(field.name) for field in fields(Policy) if field.name in rest})
        if "record" in rest:
            rest["record"] = record_from(rest["record"])
        scorer = ProbeScorer(signals_from(rest.pop("signals", [])), policy=policy, rails=rails_from(rest.pop("rails", {})), **rest)
    else:
        scorer = scorer_from_environment({TOKENIZER_FINGERPRINT: fingerprint, **os.environ})
    scorer.refuse_modes(Mode.SCREEN, because="verl has one rollout at a time scored, so that no breaker could keep it from removing all")
    scorer.refuse_modes(Mode.RELATIVE_GATE, because="verl has one rollout at a time scored, without its group; take gate")
    return scorer


def _reward(outcome: Outcome) -> float:
    reward = float(outcome.rewards[0])
    if outcome.dense is None or not outcome.dense[0].size:
        return reward
    tokens = outcome.dense[0].copy()
    tokens[-1] += reward
    return TokenRewards(tokens)
