"""Probe scores in OpenRLHF, with exact ids: --train.agent_func_path openrlhf_agent.py"""

from probescore_adapters.openrlhf import AgentExecutor

__all__ = ["AgentExecutor"]
