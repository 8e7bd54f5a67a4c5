"""The examples in docs/ run as they stand, and print what they promise behind ->."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = [page for page in sorted(DOCS.glob("*.md")) if "```python" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page, capsys):
    source = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
    exec(compile(source, str(page), "exec"), {})
    printed = capsys.readouterr().out
    promised = re.findall(r"^ *print\(.*# (?:.* )?-> (.*)$", source, re.M)
    for line in promised:
        assert line in printed.splitlines()
