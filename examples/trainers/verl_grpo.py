"""verl with a task reward and a probe, on verl's own configuration:

    python verl_grpo.py --model Qwen/Qwen3-0.6B --train train.parquet --val val.parquet --address scorer:50051

Everything else is said in verl's words: ``python verl_grpo.py … trainer.n_gpus_per_node=1 data.train_batch_size=64``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hydra import compose, initialize_config_module
from omegaconf import DictConfig

SIGNALS = "[{probe:cheating,mode:penalty,weight:2.0}]"


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict) -> float:
    """The task's own reward, as for verl's ``naive`` manager."""
    return float(ground_truth in solution_str)


def configuration(model: str, address: str, signals: str = SIGNALS, *others: str) -> DictConfig:
    overrides = [
        "reward.reward_manager.source=importlib",
        "reward.reward_manager.name=ProbeRewardManager",
        "reward.reward_manager.module.path=pkg://probescore_adapters.verl",
        f"+reward.reward_kwargs.probescore.address='{address}'",
        f"+reward.reward_kwargs.probescore.signals={signals}",
        f"reward.custom_reward_function.path={Path(__file__).resolve()}",
        # for tool calls take probe_tool_agent; without either, dense signals are summed up at the last token
        "actor_rollout_ref.rollout.agent.default_agent_loop=probe_agent",
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={Path(__file__).resolve().with_name('verl_agent_loops.yaml')}",
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.n=8",
        "algorithm.adv_estimator=grpo",
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", [*overrides, *others])


def main() -> None:
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--train", "--val", "--address"):
        parser.add_argument(name, required=True)
    parser.add_argument("--signals", default=SIGNALS, help="fields of ProbeSignal, in Hydra's words (default: %(default)s)")
    options, others = parser.parse_known_args()
    data = [f"data.train_files={options.train}", f"data.val_files={options.val}"]
    run_ppo(configuration(options.model, options.address, options.signals, *data, *others), TaskRunnerV1)


if __name__ == "__main__":
    main()
