"""Renders the HTTP gateway's documentation as one HTML page, generated from its OpenAPI description; the page loads nothing from the
network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Content security policy with which the page is sent; it forbids browsers to load anything for the page."""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #777; }
body { font: 15px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto 6rem; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2.4rem 0 .3rem; border-top: 1px solid var(--line); padding-top: 1.6rem; }
h2 code { font-size: 1rem; }
.method { font: 600 .8rem ui-monospace, monospace; border: 1px solid var(--line); border-radius: 6px; padding: 1px 7px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; } th { text-align: left; color: var(--soft); font-weight: 500; }
td, th { border-bottom: 1px solid var(--line); padding: 4px 14px 4px 0; vertical-align: top; }
td:first-child { white-space: nowrap; }
pre { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; overflow-x: auto; }
code { font-family: ui-monospace, monospace; }
h3 { font-size: .85rem; color: var(--soft); font-weight: 600; margin: 1.1rem 0 .2rem; }
"""

_EXAMPLES: Mapping[str, Any] = {
    "/openrlhf": {"query": ["What is 2 + 2? It is 4."], "prompts": ["What is 2 + 2?"], "labels": ["4"]},
    "/slime": {"prompt": "What is 2 + 2?", "response": " It is 4.", "label": "4"},
    "/v1/score": {"rollouts": [{"prompt": [1, 3, 9], "completion": [8, 12, 2], "mask": [1, 1, 0]}], "step": 100},
}


def documentation_page(openapi: Mapping[str, Any]) -> str:
    """Returns the documentation of an application as an HTML page.

    Args:
        openapi: the application's OpenAPI description, as FastAPI generates it.
    """
    info = openapi["info"]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{escape(info['title'])}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
        *(f"<p>{_prose(paragraph)}</p>" for paragraph in info.get("description", "").strip().split("\n\n")),
        "<p>The same for programs: <a href='openapi.json'>openapi.json</a></p>",
    ]
    schemas = openapi.get("components", {}).get("schemas", {})
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            parts += _operation(path, method, operation, schemas)
    parts.append("</body></html>")
    return "".join(parts)


def _operation(path: str, method: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2><span class='method'>{escape(method.upper())}</span> <code>{escape(path)}</code></h2>"
    yield f"<p>{_prose(operation.get('description', ''))}</p>"
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if body is not None:
        if path in _EXAMPLES:
            example = json.dumps(_EXAMPLES[path])
            yield f"<pre>curl http://localhost:8080{escape(path)} --json '{escape(example, quote=False)}'</pre>"
        yield from _fields("What is sent", body, schemas)
    rows = []
    for status, response in operation["responses"].items():
        rows.append((status, _prose(response.get("description", ""))))
    answered = operation["responses"].get("200", {}).get("content", {}).get("application/json", {}).get("schema", {})
    yield from _fields("What comes back", answered, schemas)
    yield "<h3>Statuses</h3>" + _table(("status", ""), rows)


def _fields(title: str, schema: Mapping[str, Any], schemas: Mapping[str, Any], seen: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields a table of the fields of a JSON object, followed by tables for the objects nested in it."""
    name, content = _resolved(schema, schemas)
    properties = content.get("properties", {})
    if not properties or name in seen:
        return
    required = content.get("required", ())
    rows = [
        (
            f"<code>{escape(field)}</code>",
            escape(_type(entry, schemas)),
            _prose(entry.get("description", "")) + ("" if field in required else " <em>optional</em>"),
        )
        for field, entry in properties.items()
    ]
    yield f"<h3>{escape(title)}</h3>" + _table(("field", "type", ""), rows)
    for entry in properties.values():
        for inner in _objects(entry):
            inner_name, _ = _resolved(inner, schemas)
            yield from _fields(inner_name, inner, schemas, (*seen, name))


def _objects(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if "$ref" in schema:
        yield schema
    for inner in (*schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else ())):
        yield from _objects(inner)


def _resolved(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    if "$ref" not in schema:
        return "", schema
    name = schema["$ref"].rpartition("/")[2]
    return name, schemas.get(name, {})


def _type(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return str(_resolved(schema, schemas)[0])
    if "anyOf" in schema:
        return " or ".join(_type(inner, schemas) for inner in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}), schemas)}"
    return str(schema.get("type", "any"))


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Returns an HTML table of cells that are given as HTML."""
    cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{column}</th>' for column in head)}</tr>{cells}</table>"


def _prose(text: str) -> str:
    """Converts plain text to HTML, in which the words that were in backticks are marked as code."""
    return "".join(f"<code>{escape(part)}</code>" if index % 2 else escape(part) for index, part in enumerate(re.split("`+", text)))
