"""Provides a set that keeps the order in which its members were added."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, TypeVar

Member = TypeVar("Member", bound=Hashable)


class OrderedSet(Generic[Member]):
    """Set whose iteration yields the members in the order in which they were added."""

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
        """Adds a member at the end of the set's order; a member that is in the set already keeps its place."""
        self._members[member] = None

    def remove(self, member: Member) -> None:
        """Removes a member from the set; raises ``KeyError`` if the member is not in the set."""
        del self._members[member]

    def move_to_end(self, member: Member) -> None:
        """Moves a member to the end of the set's order; raises ``KeyError`` if the member is not in the set."""
        self.remove(member)
        self.add(member)

    def clear(self) -> None:
        """Removes all members from the set."""
        self._members.clear()
