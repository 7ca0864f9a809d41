"""Provides a set that keeps the order in which its members were added."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, TypeVar

Member = TypeVar("Member", bound=Hashable)


class OrderedSet(Generic[Member]):
    """Is a set whose iteration yields the members in the order in which they were added."""

    __slots__ = ("_members",)

    def __init__(self, members: Iterable[Member] = ()) -> None:
        self._members = dict.fromkeys(members)

    def __contains__(self, member: object) -> bool:
        return member in self._members

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def add(self, member: Member) -> None:
        """Adds a member at the end; a member that is in the set already keeps its place."""
        self._members[member] = None

    def remove(self, member: Member) -> None:
        """Removes a member; raises ``KeyError`` if it is not in the set."""
        del self._members[member]

    def move_to_end(self, member: Member) -> None:
        """Moves a member of the set to the end; raises ``KeyError`` if it is not in the set."""
        self.remove(member)
        self.add(member)

    def clear(self) -> None:
        """Removes all members."""
        self._members.clear()
