"""The interceptor of docs/how-to/token-on-the-port.md, as it stands there: who has the token is answered, nobody else is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from calls import SERVING, TIMEOUT, health
from running_server import RunningServer, start_server

from probescore import AuthenticationError, ProbeClient, RolloutGroup

PAGE = Path(__file__).parents[2] / "docs/how-to/token-on-the-port.md"
GROUPS = [RolloutGroup([1, 5, 6, 7], [[8, 9, 10]])]
TOKEN = "right"


@pytest.fixture(scope="module")
def guarded(model: Path, probe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("auth")
    (written,) = re.findall(r"```python\n(# company_auth\.py.*?)```", PAGE.read_text(), re.DOTALL)
    (folder / "company_auth.py").write_text(written)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        patch.setenv("SCORING_TOKEN", TOKEN)
        server = start_server(model, [probe_file], admin=True, interceptors="company_auth:interceptor")
    with server:
        yield server


@pytest.mark.parametrize("metadata", [None, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}])
def test_without_the_token_no_method_is_answered(guarded: RunningServer, metadata: dict[str, str] | None) -> None:
    with ProbeClient(guarded.address, timeout=TIMEOUT, metadata=metadata) as client:
        for call in (lambda: client.score(GROUPS), lambda: list(client.score_stream(GROUPS)), client.get_server_info, client.sleep):
            with pytest.raises(AuthenticationError):
                call()


def test_with_the_token_every_method_is_answered(guarded: RunningServer) -> None:
    with ProbeClient(guarded.address, timeout=TIMEOUT, metadata={"authorization": f"Bearer {TOKEN}"}) as client:
        assert client.score(GROUPS).values("direction").shape == (1,)
        assert len(list(client.score_stream(GROUPS))) == 1
        assert client.get_server_info().workers
        client.sleep()
        client.wake()


def test_health_needs_no_token(guarded: RunningServer) -> None:
    assert health(guarded) == SERVING
