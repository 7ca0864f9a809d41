"""Probe scores in OpenRLHF, on text: --reward.remote_url openrlhf_reward.py"""

from probescore_adapters.openrlhf import RewardFunction

reward_func = RewardFunction()
