"""Adapts verl's agent loops, so that what ``ProbeRewardManager`` gives for a dense signal reaches the tokens.

Name one of them in the file of ``actor_rollout_ref.rollout.agent.agent_loop_config_path``, under a name of your own::

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
    """Is an agent loop's output that gives each token its reward, and tells the reward manager which tokens the policy sampled."""

    @classmethod
    def of(cls, output: AgentLoopOutput) -> TokenRewardOutput:
        """Returns the same output, able to do so. Of several that an agent loop returns take the last: verl scores that one only."""
        carrying: TokenRewardOutput = cls.model_construct(output.model_fields_set, **dict(output))
        carrying.extra_fields = {**output.extra_fields, RESPONSE_MASK: output.response_mask}
        return carrying

    def as_dict(self) -> dict[str, Any]:
        """Returns what verl keeps of the output; ``rm_scores`` is ``(T,)``."""
        output: dict[str, Any] = super().as_dict()
        output["extra_fields"].pop(RESPONSE_MASK, None)
        if isinstance(self.reward_score, TokenRewards):
            output["rm_scores"] = output["rm_scores"].new_tensor(self.reward_score.tokens)
        return output


class ProbeAgentLoop(SingleTurnAgentLoop):
    """Is verl's ``single_turn_agent``, with rewards of tokens."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: object) -> TokenRewardOutput:
        """Generates one answer."""
        return TokenRewardOutput.of(await super().run(sampling_params, **kwargs))


class ProbeToolAgentLoop(ToolAgentLoop):
    """Is verl's ``tool_agent``, with rewards of tokens."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: object) -> TokenRewardOutput:
        """Generates a conversation with tools."""
        return TokenRewardOutput.of(await super().run(sampling_params, **kwargs))
