"""Links from a page to what lies outside docs/: an example, a Dockerfile, a proto.

A page links to such a file by its path in the repository, so that the link works where the repository is read. In the site the file has a
page of its own, under ``repository/``, which shows it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound

ROOT = Path(__file__).parents[2]
DOCS = "docs"
PAGES = "repository"
READ_BESIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/unsupported/README.md")
"""Pages outside docs/ whose links are checked though no page may link to them."""

_FENCED_OR_LINK = re.compile(r"^ *(`{3,})[^\n]*\n.*?^ *\1 *$|(?<=\]\()([^)\s#:]+)(?=[)#])", re.MULTILINE | re.DOTALL)


def linked_files(files: Files, config: MkDocsConfig) -> Iterator[File]:
    """The pages of all files that a page links to, and of those that these link to in turn."""
    waiting = set(READ_BESIDE).union(*(_paths_outside(file.content_string, file.src_uri) for file in files.documentation_pages()))
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        content = _page_of(path)
        yield File.generated(config, _page_uri(path), content=content, inclusion=InclusionLevel.NOT_IN_NAV)
        waiting |= _paths_outside(content, _page_uri(path)) - seen


def redirect_links(markdown: str, page: str) -> str:
    """The text of a page, in which every link out of docs/ leads to the page of the file instead."""

    def redirect(match: re.Match[str]) -> str:
        path = None if match[1] else _path_of(match[0], page)
        return match[0] if path is None else posixpath.relpath(_page_uri(path), posixpath.dirname(page))

    return _FENCED_OR_LINK.sub(redirect, markdown)


def _paths_outside(markdown: str, page: str) -> set[str]:
    targets = (match[0] for match in _FENCED_OR_LINK.finditer(markdown) if not match[1])
    return {path for target in targets if (path := _path_of(target, page)) is not None and not path.startswith(f"{DOCS}/")}


def _path_of(target: str, page: str) -> str | None:
    """The path in the repository that a link leads to; none if nothing is there, which the build then reports."""
    path = posixpath.normpath(posixpath.join(_folder_of(page), target))
    return path if not path.startswith("../") and (ROOT / path).exists() else None


def _folder_of(page: str) -> str:
    """Where the source of a page lies in the repository."""
    if page.startswith(f"{PAGES}/"):
        return posixpath.dirname(page.removeprefix(f"{PAGES}/"))
    return posixpath.join(DOCS, posixpath.dirname(page))


def _page_uri(path: str) -> str:
    return path.removeprefix(f"{DOCS}/") if path.startswith(f"{DOCS}/") else f"{PAGES}/{path.removesuffix('.md')}.md"


def _page_of(path: str) -> str:
    source = ROOT / path
    hidden = "---\nsearch:\n  exclude: true\n---\n\n"
    if source.is_dir():
        entries = sorted(entry.name for entry in source.iterdir() if not entry.name.startswith((".", "__")))
        return f"{hidden}# `{path}/`\n\n" + "\n".join(f"- [{name}]({posixpath.basename(path)}/{name})" for name in entries)
    text = source.read_text()
    return hidden + text if path.endswith(".md") else f"{hidden}# `{path}`\n\n``````{_language(source.name)}\n{text.rstrip()}\n``````\n"


def _language(name: str) -> str:
    try:
        return str(get_lexer_for_filename(name).aliases[0])
    except ClassNotFound:
        return "text"
