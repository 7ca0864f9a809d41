"""Ray Serve, as ``serve run`` starts it on a Ray that runs, for tests."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import ray
from prometheus_client.parser import text_string_to_metric_families

SECONDS = 180.0
REPLICA = "ray::ServeReplica:"
# Above those that Ray's workers take, below those that the kernel gives out: Ray's processes take such before a replica can.
PORTS = range(20_000, 32_000)

T = TypeVar("T")


@dataclass
class RunningServe:
    """What ``serve run`` has started.

    Attributes:
        address: of Ray's gRPC proxy.
        metrics_port: of the first replica; that of the next is one higher.
    """

    address: str
    metrics_port: int

    def replicas(self) -> list[psutil.Process]:
        """Their processes; workers are children of these."""
        return [process for process in psutil.Process().children(recursive=True) if _title(process).startswith(REPLICA)]

    def counted(self, metric: str, *, replica: int = 0, **labels: str) -> float:
        """The sum of a metric's samples in one replica; 0 if it has none, or cannot be reached."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port + replica}/metrics", timeout=SECONDS) as answer:
                families = list(text_string_to_metric_families(answer.read().decode()))
        except OSError:
            return 0.0
        samples = [sample for family in families for sample in family.samples]
        return sum(sample.value for sample in samples if sample.name == metric and labels.items() <= sample.labels.items())


@contextmanager
def running_ray() -> Iterator[None]:
    """A Ray of this machine, of this process and its children."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S="1", OMP_NUM_THREADS="1")
    ray.init(num_cpus=4, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def serve_run(log: Path, what: str | Path, *arguments: str, port: int, metrics_port: int) -> Iterator[RunningServe]:
    """Runs ``serve run`` with an application and its arguments, or with a configuration; waits for nothing."""
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [str(Path(sys.executable).with_name("serve")), "run", str(what), *arguments]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    running = RunningServe(f"127.0.0.1:{port}", metrics_port)
    try:
        yield running
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(SECONDS)
        finally:
            process.kill()
            process.wait()
        until(lambda: not running.replicas(), "the replicas are gone")


def until(holds: Callable[[], T], what: str) -> T:
    """Waits until what `holds` returns is true, and returns it.

    Raises:
        AssertionError: it never was.
    """
    end = time.monotonic() + SECONDS
    while not (held := holds()):
        assert time.monotonic() < end, f"not within {SECONDS} s: {what}"
        time.sleep(0.2)
    return held


def free_ports(count: int) -> list[int]:
    """Free when asked, one after the other."""
    while True:
        first = random.randrange(PORTS.start, PORTS.stop - count)
        try:
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return list(range(first, first + count))


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
