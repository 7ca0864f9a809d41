"""A set that keeps the order in which its members came."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, TypeVar

Member = TypeVar("Member", bound=Hashable)


class OrderedSet(Generic[Member]):
    """Members once each, in the order in which they were added."""

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
        """Puts a member last; one that is there already keeps its place."""
        self._members[member] = None

    def remove(self, member: Member) -> None:
        """Takes a member out; raises ``KeyError`` if it is not there."""
        del self._members[member]

    def move_to_end(self, member: Member) -> None:
        """Puts a member that is there last; raises ``KeyError`` if it is not."""
        self.remove(member)
        self.add(member)

    def clear(self) -> None:
        """Takes all members out."""
        self._members.clear()
