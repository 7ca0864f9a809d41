"""The JSON Schema of the manifest: ``python -m probescore_server.probes.schema > docs/probe-manifest.schema.json``."""

from __future__ import annotations

import json
import sys

from probescore_server.probes.manifest import Manifest


def manifest_schema() -> str:
    """The schema as it is published, JSON with a final newline.

    It states shapes and ranges; that the parts fit together is checked by ``read_probe_file``.
    """
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(manifest_schema())
