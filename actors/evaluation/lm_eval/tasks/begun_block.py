"""Answers that go on in a fenced block of code which the prompt has begun."""

from collections.abc import Iterable, Sequence
from typing import Any


def before_its_end(resps: Iterable[Sequence[str]], docs: Any) -> list[list[str]]:
    """Return the text before the fence that ends the block, of each document's responses."""
    return [[text.partition("```")[0] for text in texts] for texts in resps]


def with_its_beginning(resps: Iterable[Sequence[str]], docs: Any) -> list[list[str]]:
    """Return the responses with the fence that begins the block, so that they hold it whole."""
    return [[f"```python\n{text}" for text in texts] for texts in resps]
