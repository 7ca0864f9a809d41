"""``probescore info`` and ``probescore probes``: what runs, and what a probe file is worth."""

from __future__ import annotations

import dataclasses
import io
import shutil

import numpy as np
import pytest
from click.testing import Result
from models import BOS, HIDDEN_SIZE, MAX_POSITIONS, VOCAB_SIZE, tiny_model
from rich.console import Console
from typer.testing import CliRunner
from views import loaded_probe, scored_probe, threshold

from probescore import CalibratedRollouts, OutputPer, WorkerInfo
from probescore_probes import ReferenceModel, linear_probe, read_probe_file, write_probe
from probescore_server.cli.app import app
from probescore_server.cli.info import workers_table
from probescore_server.cli.tables import manifest_tables, probes_table
from probescore_server.probes.format.manifest import Context, Evaluation, FollowUp
from probescore_server.probes.format.new_version import write_new_version


def printed(*tables) -> str:
    output = io.StringIO()
    Console(file=output, width=150).print(*tables)
    return output.getvalue()


def test_info_says_what_runs(probescore, client):
    ran = probescore("info", COLUMNS="200")
    info = client.get_server_info()

    assert ran.returncode == 0
    for fact in (info.model.fingerprint, info.tokenizer_fingerprint, "2 of 4 loaded", "universal path", "cheating@1", "mood@1"):
        assert fact in ran.stdout
    for limit in dataclasses.asdict(info.limits).values():
        assert f"{limit:,}" in ran.stdout or f"{limit / 2**20:,.0f} MiB" in ran.stdout or f"{limit:g} s" in ran.stdout, limit
    # whatever the server allows, no rollout may be longer than the model
    assert info.limits.max_rollout_tokens > info.model.max_position_embeddings == MAX_POSITIONS
    assert f"one rollout {MAX_POSITIONS} tokens" in " ".join(ran.stdout.split())


def test_probes_list_shows_labels_and_thresholds(probescore, client):
    (cheating, _) = client.list_probes()

    ran = probescore("probes", "list", COLUMNS="200")

    assert "calm, angry" in ran.stdout
    assert f"{cheating.calibrations[0].threshold:.4g} at 5.0% false positives" in ran.stdout


@pytest.mark.parametrize("command", [["probes", "list"], ["info"]])
def test_what_an_author_wrote_is_shown_as_text(probescore, command):
    ran = probescore(*command, COLUMNS="200")

    assert "Copies [bold]the[/bold] ⟨1B⟩[31mcache" in ran.stdout


def test_a_worker_that_is_down_or_was_restarted_is_shown():
    table = workers_table((WorkerInfo("cuda:0", "bfloat16", "universal", False, 3),))

    assert "not ready, bfloat16, universal path, restarted 3 times" in printed(table)


def test_accepted_mismatches_are_not_hidden():
    pools = scored_probe(reductions=(), output_per=OutputPer.ROLLOUT)
    probe = dataclasses.replace(loaded_probe(pools, threshold(1, None, "x")), accepted_mismatches=("tokenizer_fingerprint",))

    text = printed(probes_table([probe]))

    assert "served though tokenizer_fingerprint does not match" in text
    assert "pools by itself" in text
    assert "x: 1 at 5.0% false positives" in text


def test_inspect_shows_the_manifest_and_the_checks(probescore, probe_files):
    ran = probescore("probes", "inspect", probe_files["cheating"], COLUMNS="200")

    manifest = read_probe_file(probe_files["cheating"]).manifest
    assert ran.returncode == 0
    for fact in (
        "cheating@1",
        "resid_post.1",
        "must be BOS",
        "mean of the logit",
        manifest.graph_sha256,
        manifest.model.fingerprint,
        f"{manifest.calibrations[0].threshold:.4g} after mean",
        "14 in 2 rollouts",
        "⟨1B⟩[31mcache",
    ):
        assert fact in ran.stdout
    assert "✓" in ran.stdout


def test_inspect_says_what_kinds_of_probes_depend_on(probe_files):
    manifest = read_probe_file(probe_files["cheating"]).manifest.model_copy(
        update={
            "context": Context(kind="causal", window=10, sees_prompt=True),
            "reduction": None,
            "exclude_special_tokens": True,
            "expects_bos": None,
            "follow_up": FollowUp(token_ids=(5, 6)),
            "evaluations": (Evaluation(metric="auroc", value=0.9, low=0.8, high=0.95, dataset="held out"),),
        }
    )

    text = printed(*manifest_tables(manifest))

    for fact in (
        "a token and those before it, 10 at most, the prompt's too",
        "pools by itself",
        "left out of the reduction",
        "not checked",
        "2 tokens",
        "auroc 0.9 (0.8 to 0.95) on held out",
    ):
        assert fact in text


def test_inspect_refuses_a_file_that_was_changed(probescore, probe_files, tmp_path):
    changed = tmp_path / "changed.onnx"
    changed.write_bytes(probe_files["cheating"].read_bytes().replace(b"Copies", b"Copied"))

    ran = probescore("probes", "inspect", changed)

    assert (ran.returncode, ran.stdout) == (1, "")
    assert "manifest_sha256" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_verify_recomputes_what_the_file_promises(probescore, probe_files, model):
    ran = probescore("probes", "verify", probe_files["cheating"], "--model", model)

    assert ran.returncode == 0
    assert "✓ recomputing golden scores" in ran.stdout
    assert "cheating@1 can be served" in ran.stdout


def test_verify_refuses_another_model(probescore, probe_files):
    ran = probescore("probes", "verify", probe_files["cheating"], "--model", tiny_model(seed=1))

    assert ran.returncode == 1
    assert "✗" in ran.stdout
    assert "model.fingerprint" in ran.stderr
    assert "can be served" not in ran.stdout


def test_verify_needs_a_model_that_is_there(probescore, probe_files, tmp_path):
    shutil.copy(probe_files["cheating"], tmp_path / "probe.onnx")

    ran = probescore("probes", "verify", tmp_path / "probe.onnx", "--model", tmp_path, HF_HUB_OFFLINE="1")

    assert ran.returncode == 1
    assert ran.stderr.startswith("probescore: ")
    assert ran.stderr.count("\n") == 1


# -------------------------------------------------------------------------------------------------------------------------- folders


def run(*arguments) -> Result:
    """The command, in this process: torch is imported once."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["probes", *map(str, arguments)])


@pytest.fixture
def folder(probe_files, tmp_path):
    """Versions 9, 10 and 11 of ``cheating``, ``mood``, a file that was changed, and what is not a probe file."""
    folder = tmp_path / "folder"
    shutil.copytree(probe_files["cheating"].parent, folder)
    before = read_probe_file(probe_files["cheating"])
    (folder / "cheating.onnx").unlink()
    for version in ("9", "10", "11"):
        write_new_version(folder / f"{version}.onnx", before, version=version, evaluations=[])
    (folder / "changed.onnx").write_bytes(probe_files["mood"].read_bytes().replace(b"angry", b"Angry"))
    (folder / ".partial.onnx").write_bytes(b"half a file")
    (folder / "README.md").write_text("# Probes")
    return folder


def test_a_folder_is_listed_by_version_and_its_faults_are_named(folder):
    ran = run("list", folder)
    assert ran.exit_code == 1
    assert [ran.output.index(f"cheating@{version}") for version in ("9", "10", "11")] == sorted(
        ran.output.index(f"cheating@{version}") for version in ("9", "10", "11")
    )
    assert "changed.onnx: manifest_sha256: found sha256:" in ran.output
    assert ".partial" not in ran.output
    one = run("list", folder / "9.onnx")
    assert (one.exit_code, "cheating@9" in one.output, "cheating@10" in one.output) == (0, True, False)


def test_two_files_of_one_version_are_a_fault(folder, probe_files):
    write_new_version(folder / "twin.onnx", read_probe_file(probe_files["cheating"]), version="9", calibrations=[])
    for command in (("list", folder), ("inspect", folder), ("diff", folder, folder / "mood.onnx")):
        ran = run(*command)
        assert (ran.exit_code, "twin.onnx: version: found cheating@9 with other content than in" in ran.output) == (1, True), ran.output


def test_what_a_threshold_was_found_on_is_listed():
    conditions = CalibratedRollouts(20, "float32", 3, 3, 2, 1500, ("chat",), ("bos template",), (5,))
    probe = loaded_probe(scored_probe(), dataclasses.replace(threshold(1), conditions=conditions))
    assert "for prompts of 3 tokens (bos template), completions of 2 to 1,500" in printed(probes_table([probe]))


def test_every_probe_of_a_folder_is_inspected_and_verified(folder, model):
    ran = run("inspect", folder)
    assert ran.exit_code == 1
    assert [ran.output.count(f"cheating@{version}\n") or ran.output.count(f"cheating@{version} ") for version in ("9", "10", "11")] == [
        1,
        1,
        1,
    ]
    assert ran.output.count("digests match") == 4

    # what the model refuses keeps no other from being verified
    (folder / "changed.onnx").unlink()
    other = tiny_model(seed=1)
    random = np.random.default_rng(0)
    golden = [([BOS, *random.integers(4, VOCAB_SIZE, 5)], random.integers(4, VOCAB_SIZE, 7)) for _ in range(2)]
    foreign = linear_probe(random.standard_normal(HIDDEN_SIZE))
    write_probe(
        folder / "foreign.onnx", foreign, ReferenceModel.load(other), name="foreign", version="1", taps=["resid_post.1"], golden=golden
    )
    ran = run("verify", folder, "--model", model)
    assert ran.exit_code == 1
    assert [f"{key} can be served" in ran.output for key in ("cheating@9", "cheating@10", "cheating@11", "mood@1", "foreign@1")] == [
        *(True,) * 4,
        False,
    ]
    assert "foreign.onnx: model.fingerprint: found sha256:" in ran.output


def test_folders_are_compared_by_version_and_then_by_their_highest(folder, probe_files):
    (folder / "changed.onnx").unlink()
    ran = run("diff", folder, probe_files["cheating"].parent)
    assert ran.exit_code == 0, ran.output
    lines = [" ".join(line.split()) for line in ran.output.splitlines()]
    assert [line for line in lines if line.endswith(("yes no", "no yes"))] == [
        "cheating@9 yes no",
        "cheating@10 yes no",
        "cheating@11 yes no",
        "cheating@1 no yes",
    ]
    assert "cheating@11 and cheating@1" in lines
    assert 'version "11" "1"' in lines
    assert "mood@1 and" not in ran.output
    assert "= the same 2 versions of probes" in run("diff", probe_files["cheating"].parent, probe_files["cheating"].parent).output
    # a folder with one file is compared as that file is, and a file that is refused is a fault whatever it is compared with
    (folder / "changed.onnx").write_bytes(b"no probe")
    ran = run("diff", folder / "9.onnx", folder / "changed.onnx")
    assert (ran.exit_code, "changed.onnx: " in ran.output, "graphs" in ran.output) == (1, True, False)


@pytest.mark.parametrize("command", ["list", "inspect", "verify"])
def test_what_is_not_there_is_named(command, tmp_path):
    options = ("--model", tmp_path) if command == "verify" else ()
    assert "nothing: No such file or directory" in run(command, tmp_path / "nothing", *options).output
    empty = run(command, tmp_path, *options)
    assert (empty.exit_code, "there are no probe files (*.onnx) in it" in empty.output) == (2, True)
