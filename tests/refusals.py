"""How an author is refused: in words of ours, and of nobody else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from probescore_server.errors import ModelRefused, ProbeRefused

# What other libraries say, and what they are called: an author reads of neither.
FOREIGN = re.compile(
    r"pydantic|validation error for|errors\.pydantic|broadcast|inhomogeneous|mat1|could not be (converted|read)|invalid literal|dtype='|"
    r"Traceback|AutoModel|Unrecognized|object has no attribute|unexpected keyword|index out of range|size mismatch for|Dim\(|"
    r"not subscriptable|\n"
)


def check_in_words(error: BaseException, argument: str) -> None:
    """That an error names the argument and what to give instead, and says nothing that another library would."""
    message = str(error)
    assert type(error) in (ValueError, TypeError, ProbeRefused, ModelRefused), repr(error)
    assert argument in message, message
    assert not FOREIGN.search(message), message
    assert len(message) < 600, message
    assert isinstance(error, ProbeRefused) or re.search(r"; |: |, expected ", message), message


def generator(values: Any) -> Iterator[Any]:
    yield from values
