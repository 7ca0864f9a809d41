"""``probescore info`` and ``probescore probes``: what runs, and what a probe file is worth."""

from __future__ import annotations

import dataclasses
import io
import shutil

import pytest
from models import tiny_model
from rich.console import Console
from views import loaded_probe, scored_probe, threshold

from probescore import OutputPer, WorkerInfo
from probescore_probes import read_probe_file
from probescore_server.cli.info import workers_table
from probescore_server.cli.tables import manifest_tables, probes_table
from probescore_server.probes.format.manifest import Context, Evaluation, FollowUp


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
