"""Adapts the agent loops of the trainer verl, so that the rewards of tokens that ``ProbeRewardManager`` computes for a dense signal (rule
from probe scores to rewards) reach the tokens.

Name one of the two agent loops of this module in the file at ``actor_rollout_ref.rollout.agent.agent_loop_config_path``, under a name of
your own::

    - name: probe_agent
      _target_: probescore_adapters.verl_agent_loop.ProbeAgentLoop
"""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop

from probescore_adapters.verl import RESPONSE_MASK, TokenRewards


class TokenRewardOutput(AgentLoopOutput):
    """Output of an agent loop of the trainer verl that gives each token its reward, and passes the mask of the tokens that the policy
    sampled to the reward manager.
    """

    @classmethod
    def of(cls, output: AgentLoopOutput) -> TokenRewardOutput:
        """Returns an agent loop's output as a ``TokenRewardOutput``. If an agent loop returns several outputs, pass the last one: verl
        scores only the last output.
        """
        carrying: TokenRewardOutput = cls.model_construct(output.model_fields_set, **dict(output))
        carrying.extra_fields = {**output.extra_fields, RESPONSE_MASK: output.response_mask}
        return carrying

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields of an agent loop's output that the trainer verl keeps, as a dictionary; ``rm_scores``, the reward of each
        token, is ``(T,)``.
        """
        output: dict[str, Any] = super().as_dict()
        output["extra_fields"].pop(RESPONSE_MASK, None)
        if isinstance(self.reward_score, TokenRewards):
            output["rm_scores"] = output["rm_scores"].new_tensor(self.reward_score.tokens)
        return output


class ProbeAgentLoop(SingleTurnAgentLoop):
    """Agent loop like ``single_turn_agent`` of the trainer verl, with a reward for each token."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: object) -> TokenRewardOutput:
        """Generates one completion, as ``single_turn_agent`` of the trainer verl does."""
        return TokenRewardOutput.of(await super().run(sampling_params, **kwargs))


class ProbeToolAgentLoop(ToolAgentLoop):
    """Agent loop like ``tool_agent`` of the trainer verl, with a reward for each token."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: object) -> TokenRewardOutput:
        """Generates a conversation with tools, as ``tool_agent`` of the trainer verl does."""
        return TokenRewardOutput.of(await super().run(sampling_params, **kwargs))
