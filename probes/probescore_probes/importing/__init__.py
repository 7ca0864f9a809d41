"""Converts probes that other libraries wrote into probe files of probescore.

    from probescore_probes import ReferenceModel
    from probescore_probes.importing import AuthorScores, import_probe

    model = ReferenceModel.load("meta-llama/Llama-3.1-8B-Instruct")
    made = import_probe("probe_head.bin", model, name="hallucination", version="1", output="hallucination.onnx", author_scores=scores)

``docs/how-to/import-a-probe.md`` has a table of the formats, and what the files of each format do not say.
"""

from __future__ import annotations

from probescore_probes.importing.author_scores import AuthorScores
from probescore_probes.importing.pickles import RunsCode
from probescore_probes.importing.probe_import import NOT_COMPARED, ImportedProbe, import_probe
from probescore_probes.importing.registry import FORMATS

__all__ = ["FORMATS", "NOT_COMPARED", "AuthorScores", "ImportedProbe", "RunsCode", "import_probe"]
