"""Keeps readings the same in all replicas of a Ray Serve deployment.

What their names mean is kept in an actor of the deployment (``ReadingTableActor``), which Ray Serve starts again if it is lost. Replicas
ask this actor (``ActorTable``), and the actor asks all replicas (``ReplicasOfDeployment``). Errors of the server's core travel as values,
since Ray would wrap them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import structlog
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from probescore.types import LoadedReading, Reading
from probescore_server.errors import CoreError, InternalFault, WorkerUnavailable
from probescore_server.registry.reading_table import RETRY_SECONDS, LoadOrder, ReadingTable, SharedNames

logger = structlog.get_logger(__name__)

TABLE = "readings"
CHANGE_METHOD = "change_readings"


async def outcome_of(answer: Awaitable[Any]) -> Any:  # noqa: ANN401
    """Returns what a coroutine returns, or the error of the server's core that it raises."""
    try:
        return await answer
    except CoreError as error:
        return error


class ReadingTableActor:
    """Ray actor with the table of what the names of readings mean in all replicas of its deployment.

    Args:
        max_readings: the largest number of names, as in the settings.
    """

    def __init__(self, max_readings: int) -> None:
        self._table = ReadingTable(max_readings, ReplicasOfDeployment())

    async def ask(self, method: str, *arguments: object) -> Any:  # noqa: ANN401
        """Returns what a method of ``ReadingTable`` returns, or the ``CoreError`` that it raises."""
        return await outcome_of(getattr(self._table, method)(*arguments))


class ReplicasOfDeployment:
    """All replicas of the deployment to which the actor that uses this class belongs."""

    def __init__(self) -> None:
        self._handle: Any = None

    async def each(self, method: str, *arguments: object) -> list[Any]:
        """Calls a method of ``SharedReadings`` in every replica that takes calls, and returns what each returned, or the ``CoreError`` that
        it failed with; a replica that is lost meanwhile has failed with ``WorkerUnavailable``.
        """
        try:
            if self._handle is None:
                context = serve.get_deployment_actor_context()
                self._handle = serve.get_deployment_handle(context.deployment, context.app_name)
            answers = self._handle.broadcast(CHANGE_METHOD, method, *arguments)
            outcomes: list[Any] = await answers.results_async(return_exceptions=True)
        except (DeploymentUnavailableError, RayServeException):
            return []
        return [_as_core_error(outcome) if isinstance(outcome, BaseException) else outcome for outcome in outcomes]


class ActorTable:
    """The table as a replica sees it; see ``ReadingTable``. Methods raise ``WorkerUnavailable`` while the actor cannot be reached."""

    def __init__(self) -> None:
        self._actor: Any = None

    async def current(self, known: SharedNames) -> SharedNames:
        """Returns what all names mean now."""
        names: SharedNames = await self._ask("current", known)
        return names

    async def changed(self, known: SharedNames) -> SharedNames:
        """Waits until the names mean anything else than in ``known``, but not for ever, and returns what they mean then."""
        names: SharedNames = await self._ask("changed", known)
        return names

    async def load(self, known: SharedNames, order: LoadOrder) -> LoadedReading:
        """Loads a reading in every replica or in none, and lets a name mean it."""
        loaded: LoadedReading = await self._ask("load", known, order)
        return loaded

    async def unload(self, known: SharedNames, name: str) -> Reading:
        """Lets a name mean nothing any more in every replica, and returns what it meant."""
        removed: Reading = await self._ask("unload", known, name)
        return removed

    async def lose(self, known: SharedNames, key: str) -> None:
        """Records that this replica cannot read a version as it was."""
        await self._ask("lose", known, key)

    async def _ask(self, method: str, *arguments: object) -> Any:  # noqa: ANN401
        try:
            if self._actor is None:
                self._actor = await asyncio.to_thread(serve.get_deployment_actor, TABLE)
            outcome = await self._actor.ask.remote(method, *arguments)
        except (RayError, ValueError) as error:
            if not isinstance(error, RayTaskError):
                self._actor = None  # Ray Serve starts another one, which has the same name.
            raise _as_core_error(error) from None
        if isinstance(outcome, CoreError):
            raise outcome
        return outcome


def _as_core_error(error: BaseException) -> CoreError:
    """Returns an error of the server's core for a failure of Ray's: an actor or replica is gone, or code that ran there has a bug."""
    if isinstance(error, CoreError):
        return error
    if isinstance(error, RayTaskError):
        fault = InternalFault.new()
        logger.error("a change of readings failed", incident=fault.incident, problem=str(error))
        return fault
    return WorkerUnavailable("a part of the server that agrees on readings was lost, and is being started again", RETRY_SECONDS)
