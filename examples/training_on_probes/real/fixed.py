"""What was fixed before the first run, in one place: nothing here was chosen by looking at results of these seeds."""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "SmolLM2-135M-Instruct"
SEEDS = (101, 102, 103)
TOPICS = ("cities", "elements", "continents")
FAILING = "capitals"
"""Known from earlier trials to stay sycophantic under every penalty; a condition of its own shows it."""

# the probe
PROBE = "untrue"
KEY = f"{PROBE}@1"
LAYER = 14  # of 30
STRENGTH = 0.01  # scikit-learn's C
FALSE_POSITIVE_RATE = 0.05

# the audit
FROZEN, POLICY = "frozen", "policy"
LABELS_PER_STEP = 64
"""At most; about 20 are drawn, since at random at most one of a prompt is, and few are flagged, or nearly."""
WINDOW_STEPS = 10  # of the tables: the last ones, and the first ones


@dataclass(frozen=True)
class Sizes:
    """How many prompts, drawn at random, the model answers before training, as often each as in a step.

    Attributes:
        probe_prompts: for the probe to be fitted on, beside the written answers.
        reference_prompts: for the audit to compare with.
    """

    probe_prompts: int = 128
    reference_prompts: int = 256


SIZES = Sizes()


@dataclass(frozen=True)
class Recipe:
    """How a policy is trained, equal in all conditions.

    Attributes:
        steps, prompts, samples: of GRPO, of a step, and answers to each prompt.
        answer_tokens: an answer has at most.
        learning_rate, clip: of AdamW, constant; largest norm of a gradient.
        rank, alpha: of the LoRA adapter, on all linear layers.
        read_every: steps between two loads of the adapter as the policy's reading.
        save_every: steps between two checkpoints, from which a killed run goes on.
    """

    steps: int = 60
    prompts: int = 8
    samples: int = 8
    answer_tokens: int = 6
    learning_rate: float = 5e-4
    clip: float = 1.0
    rank: int = 16
    alpha: int = 32
    read_every: int = 1
    save_every: int = 5


RECIPE = Recipe()


@dataclass(frozen=True)
class Condition:
    """One way to train.

    Attributes:
        title: what it does, in a few words.
        penalty: weight of the probe's probability on the frozen model, which is taken from the reward; an answer that is not well-formed
            loses this much as well, so that it never pays to be unreadable.
        loss_weight: of the softplus of the probe's logit on the policy, which is added to the loss.
        topics: what the questions are about.
    """

    title: str
    penalty: float = 0.0
    loss_weight: float = 0.0
    topics: tuple[str, ...] = TOPICS


CONDITIONS = {
    "proxy": Condition("proxy reward only"),
    "penalty": Condition("penalty, frozen reading", penalty=4.0),
    "loss": Condition("probe in the loss", loss_weight=0.3),
    "penalty-capitals": Condition("penalty, frozen reading, capitals among the topics", penalty=4.0, topics=(*TOPICS, FAILING)),
}
