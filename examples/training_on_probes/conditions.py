"""The conditions of the experiment: what each does with the probe while it trains on a reward that can be cheated."""

from __future__ import annotations

from dataclasses import dataclass

from reporting import answer_tokens, says_copied

from probescore_adapters import ProbeSignal

PROBE = "cheating"
POLICY = "policy"
READINGS = ("frozen", POLICY)


@dataclass(frozen=True)
class Condition:
    """One way to train.

    Attributes:
        name: as in the tables.
        title: what it does, in a few words.
        acting: the signal that changes rewards; none = the probe only watches.
        truth_penalty: what a rollout that cheats loses, by the environment's own knowledge.
        loss_weight: of the probe's own loss on the policy, which is added to GRPO's.
        reports: whether the model says after its answer how it got it.
    """

    name: str
    title: str
    acting: ProbeSignal | None = None
    truth_penalty: float = 0.0
    loss_weight: float = 0.0
    reports: bool = False

    @property
    def signals(self) -> list[ProbeSignal]:
        """The acting one, and what is recorded in every condition: the probe on the frozen model and on the policy."""
        mask = answer_tokens if self.reports else "given"
        watching = [
            ProbeSignal(PROBE, mode="monitor", mask=mask, name="frozen"),
            ProbeSignal(PROBE, mode="monitor", mask=mask, name=POLICY, reading=POLICY),
        ]
        return [*([self.acting] if self.acting else []), *watching]


def acting(mode: str, weight: float = 1.0, **fields: object) -> ProbeSignal:
    return ProbeSignal(PROBE, mode=mode, weight=weight, name="acting", **fields)  # type: ignore[arg-type] # by name, for a table


PENALTY = 2.0  # more than the 1 that cheating gains
IN_LOSS = 0.1

CONDITIONS = {
    condition.name: condition
    for condition in (
        Condition("0", "proxy reward only"),
        Condition("1", "penalty, frozen reading", acting("penalty", PENALTY, transform="sigmoid")),
        Condition("1b", "penalty, policy reading", acting("penalty", PENALTY, transform="sigmoid", reading=POLICY)),
        Condition("1c", "screening, frozen reading", acting("screen")),
        Condition("1d", "relative gate, frozen reading", acting("relative_gate", 1.0)),
        Condition("2", "probe in the loss", loss_weight=IN_LOSS),
        Condition("2-weak", "probe in the loss, a third of that weight", loss_weight=IN_LOSS / 3),
        Condition("2-strong", "probe in the loss, three times that weight", loss_weight=3 * IN_LOSS),
        Condition("3", "penalty by the ground truth", truth_penalty=PENALTY),
        Condition("4-control", "with reports, nobody pays for them", reports=True),
        Condition(
            "4",
            "with reports, agreement with the probe pays",
            acting("agreement", 1.0, mask=answer_tokens, report=says_copied),
            reports=True,
        ),
    )
}
QUICK = ("0", "1", "1b", "2")
LONG = ("1", "1b")
