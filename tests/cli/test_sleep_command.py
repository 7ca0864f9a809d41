"""``probescore sleep`` and ``probescore wake``: what they say, and what they say when it cannot be done."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from running_server import RunningServer, start_server

from probescore import ProbeClient, Transfer
from probescore_server.cli.sleep import print_transfers


@pytest.fixture(scope="module")
def shared(model) -> Iterator[RunningServer]:
    """A server that takes sleep and wake, of a model without probes."""
    with start_server(model, [], admin=True) as server:
        yield server


def test_a_server_is_put_to_sleep_and_woken(probescore, shared):
    slept = probescore("sleep", "--address", shared.address)
    shown = probescore("info", "--address", shared.address)
    woken = probescore("wake", "--address", shared.address)

    assert (slept.returncode, slept.stderr) == (0, "")
    assert slept.stdout.startswith("cpu is asleep after ")
    assert "asleep, float32" in shown.stdout
    assert woken.stdout.startswith("cpu is awake after ")
    with ProbeClient(shared.address) as client:
        assert client.get_server_info().workers[0].ready


@pytest.mark.parametrize("command", ["sleep", "wake"])
def test_a_server_that_does_not_take_them_is_named_with_the_setting_to_change(probescore, command):
    ran = probescore(command)

    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "probescore: the server does not take sleep, wake and reload: its setting admin is off\n"


def test_where_nobody_listens_the_address_is_named(probescore):
    ran = probescore("sleep", "--address", "127.0.0.1:1")

    assert ran.returncode == 1
    assert ran.stderr.startswith("probescore: no server is ready at 127.0.0.1:1")


def test_a_timeout_must_be_one(probescore):
    assert probescore("wake", "--timeout", "0").returncode == 2


def test_seconds_and_gibibytes_are_shown_for_each_device(capsys):
    transfers = [Transfer("cuda:0", 1.234, 8 << 30, 9 << 30), Transfer("cuda:1", 0.5, 1 << 29, 0)]

    print_transfers(transfers, "asleep", "of weights to host memory", "given back")

    assert capsys.readouterr().out.splitlines() == [
        "cuda:0 is asleep after 1.23 s: 8.00 GiB of weights to host memory, 9.00 GiB given back",
        "cuda:1 is asleep after 0.50 s: 0.50 GiB of weights to host memory, 0.00 GiB given back",
    ]
