"""What the site has beyond its pages: the parts that are generated from the code, and the files of the repository that pages link to."""

from __future__ import annotations

import re
from collections.abc import Callable

import command_line
import contract
import repository
import settings
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

GENERATORS: dict[str, Callable[[], str]] = {"command line": command_line.write, "settings": settings.write, "contract": contract.write}

_PLACE = re.compile(r"^<!-- generated: (.+) -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each file of the repository that a page links to."""
    for file in repository.linked_files(files, config):
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in what is generated, and lets links out of docs/ lead to the pages that were added."""
    markdown = _PLACE.sub(lambda place: GENERATORS[place[1]](), markdown)
    return repository.redirect_links(markdown, page.file.src_uri)
