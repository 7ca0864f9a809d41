"""What is scored: the loads, cut into units. Every variant scores a unit before the next unit begins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

# With these lengths the reference load pads 32% and shares 48%, as the load of the engine's first measurements did.
_LENGTHS_SEED = 222


@dataclass(frozen=True, eq=False)
class LoadGroup:
    """A prompt ``(P,)`` and its completions, ``(T,)`` each."""

    prompt: Ids
    completions: tuple[Ids, ...]

    def sequences(self) -> list[Ids]:
        """The prompt with each completion."""
        return [np.concatenate([self.prompt, completion]) for completion in self.completions]


@dataclass(frozen=True, eq=False)
class Unit:
    """What is timed at a time.

    Attributes:
        calls: scored one after the other, as they would become known.
        earlier: scored before, untimed, by variants that remember what they have seen.
        probes: how many of the loaded probes are asked for; 0 = all.
        per_token: whether every token's scores are compared, or each completion's mean.
        at_once: all calls are known at the same time, so that whoever can reads them together.
    """

    calls: tuple[LoadGroup, ...]
    earlier: tuple[LoadGroup, ...] = ()
    probes: int = 0
    per_token: bool = True
    at_once: bool = False

    @property
    def rounds(self) -> tuple[tuple[LoadGroup, ...], ...]:
        """The calls that are known together, one round after the other."""
        return (self.calls,) if self.at_once else tuple((call,) for call in self.calls)

    @property
    def completion_tokens(self) -> int:
        """Of all calls."""
        return sum(len(completion) for call in self.calls for completion in call.completions)

    @property
    def real_tokens(self) -> int:
        """Prompts and completions, a prompt counted once per completion: what must be read without sharing."""
        return self.completion_tokens + sum(len(call.prompt) * len(call.completions) for call in self.calls)

    @property
    def padded_tokens(self) -> int:
        """What each round takes as one padded batch."""
        lengths = [[len(ids) for call in calls for ids in call.sequences()] for calls in self.rounds]
        return sum(len(each) * max(each) for each in lengths)

    def segment_sizes(self) -> list[int]:
        """Tokens of each piece that is new when everything before it is known: what is left of each prompt, and each completion. Of calls
        that are known at once nothing is before another.
        """
        known = [ids for group in self.earlier for ids in group.sequences()]
        sizes = []
        for call in self.calls:
            shared = 0 if self.at_once else max((_common_prefix(call.prompt, ids) for ids in known), default=0)
            sizes += [len(call.prompt) - shared, *map(len, call.completions)]
            known += call.sequences()
        return [size for size in sizes if size]

    def shortened(self) -> Unit:
        """The first few tokens of the first completion: to touch everything once."""
        first = self.calls[0]
        return replace(self, calls=(LoadGroup(first.prompt[:4], (first.completions[0][:4],)),), earlier=())

    def save(self, path: Path) -> None:
        """Writes it for another process."""
        arrays = {
            f"{part}.{call}.{index}": ids
            for part, groups in (("calls", self.calls), ("earlier", self.earlier))
            for call, group in enumerate(groups)
            for index, ids in enumerate((group.prompt, *group.completions))
        }
        np.savez(path, options=np.array([self.probes, self.per_token, self.at_once]), **arrays)  # type: ignore[arg-type] # its stubs' allow_pickle

    @classmethod
    def read(cls, path: Path) -> Unit:
        """What ``save`` wrote."""
        arrays = np.load(path)
        groups: dict[str, dict[int, dict[int, Ids]]] = {"calls": {}, "earlier": {}}
        for key in arrays.files:
            if key != "options":
                part, call, index = key.split(".")
                groups[part].setdefault(int(call), {})[int(index)] = arrays[key]
        calls, earlier = (tuple(_group(found[call]) for call in sorted(found)) for found in groups.values())
        return cls(calls, earlier, int(arrays["options"][0]), bool(arrays["options"][1]), bool(arrays["options"][2]))


def _common_prefix(first: Ids, second: Ids) -> int:
    shortest = min(len(first), len(second))
    different = np.flatnonzero(first[:shortest] != second[:shortest])
    return int(different[0]) if len(different) else shortest


def _group(arrays: dict[int, Ids]) -> LoadGroup:
    prompt, *completions = (arrays[index] for index in sorted(arrays))
    return LoadGroup(prompt, tuple(completions))


@dataclass(frozen=True)
class Load:
    """A kind of work. Lengths are the same in every repetition and drawn from ``(shortest, longest)``; ids are new in each.

    Attributes:
        kind: ``rollouts``: groups of completions. ``second_epoch``: the same, after other completions of the same prompts.
            ``conversation``: each group is a conversation, read a turn at a time; a turn is a prompt and a completion. ``data_set``: groups
            that are all known at once.
        groups: units of a repetition; of a data set, groups of its one unit.
        completions: of a group; or the turns of a conversation.
        probes: how many are scored.
        beside: what ``Load.beside`` makes.
    """

    name: str
    kind: Literal["rollouts", "second_epoch", "conversation", "data_set"] = "rollouts"
    groups: int = 1
    completions: int = 8
    prompt_tokens: tuple[int, int] = (350, 450)
    completion_tokens: tuple[int, int] = (27, 1000)
    probes: int = 1
    beside: str = ""

    def units(self, repetition: int, vocab_size: int) -> Iterator[Unit]:
        """The units of a repetition, new ids in each: nothing is remembered from one to the next."""
        lengths, random = np.random.default_rng(_LENGTHS_SEED), np.random.default_rng([0, repetition + 1])
        if self.kind == "data_set":
            yield Unit(tuple(self._group(lengths, random, vocab_size) for _ in range(self.groups)), at_once=True)
            return
        for _ in range(self.groups):
            match self.kind:
                case "conversation":
                    yield self._conversation(lengths, random, vocab_size)
                case "second_epoch":
                    first = self._group(lengths, random, vocab_size)
                    again = tuple(random.integers(vocab_size, size=len(completion)) for completion in first.completions)
                    yield Unit((LoadGroup(first.prompt, again),), earlier=(first,))
                case "rollouts":
                    yield Unit((self._group(lengths, random, vocab_size),), per_token=self.probes == 1)

    def compared(self, unit: Unit, vocab_size: int) -> Unit | None:
        """What our variants are also timed on, with other ids: the same work the other way; ``None`` if there is nothing to compare."""
        if self.beside == "":
            return None
        random = np.random.default_rng(unit.calls[0].prompt)
        fresh = [
            LoadGroup(
                random.integers(vocab_size, size=len(call.prompt)),
                tuple(random.integers(vocab_size, size=len(completion)) for completion in call.completions),
            )
            for call in unit.calls
        ]
        if self.kind == "conversation":
            whole = np.concatenate([fresh[-1].prompt, *fresh[-1].completions])
            start = len(unit.calls[0].prompt)
            return replace(unit, calls=(LoadGroup(whole[:start], (whole[start:],)),))
        return replace(unit, calls=tuple(fresh), probes=1)

    def _group(self, lengths: np.random.Generator, random: np.random.Generator, vocab_size: int) -> LoadGroup:
        prompt = int(lengths.integers(self.prompt_tokens[0], self.prompt_tokens[1] + 1))
        return LoadGroup(
            random.integers(vocab_size, size=prompt),
            tuple(random.integers(vocab_size, size=length) for length in self._completion_lengths(lengths)),
        )

    def _conversation(self, lengths: np.random.Generator, random: np.random.Generator, vocab_size: int) -> Unit:
        turns, history = [], np.zeros(0, np.int64)
        for length in self._completion_lengths(lengths):
            asked = int(lengths.integers(self.prompt_tokens[0], self.prompt_tokens[1] + 1))
            prompt = np.concatenate([history, random.integers(vocab_size, size=asked)])
            answer = random.integers(vocab_size, size=length)
            turns.append(LoadGroup(prompt, (answer,)))
            history = np.concatenate([prompt, answer])
        return Unit(tuple(turns))

    def _completion_lengths(self, lengths: np.random.Generator) -> list[int]:
        """Most are short, some go on to the limit: a gamma distribution, as reasoning traces have, of mean a third of the longest."""
        shortest, longest = self.completion_tokens
        drawn = lengths.gamma(2, longest / 6, self.completions)
        return [int(length) for length in np.clip(drawn, shortest, longest)]


LOADS = {
    load.name: load
    for load in (
        Load("reference", groups=3),
        Load("prompt_heavy", completions=16, prompt_tokens=(1000, 1000), completion_tokens=(100, 100)),
        Load("second_epoch", "second_epoch", completions=16, prompt_tokens=(1000, 1000), completion_tokens=(100, 100)),
        Load("conversation", "conversation", 1, 10, (50, 150), (50, 300), beside="turn by turn over read once"),
        Load("one_prompt", completions=64, prompt_tokens=(80, 120), completion_tokens=(8, 40)),
        Load("statements", "data_set", 48, 1, (2, 4), (8, 14)),
        Load("statement_pairs", "data_set", 48, 2, (5, 9), (1, 3)),
        Load("chat_rows", "data_set", 24, 1, (40, 120), (20, 80)),
        Load("many_probes", probes=1024, beside="1,024 probes over one"),
    )
}
