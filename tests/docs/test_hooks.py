"""What the site makes of the files that it includes, without mkdocs."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hooks(monkeypatch):
    for name, attribute in (("mkdocs.exceptions", "PluginError"), ("mkdocs.structure.files", "File")):
        module = ModuleType(name)
        setattr(module, attribute, type(attribute, (Exception,), {}))
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_page(hooks, page: str, markdown: str) -> str:
    there = SimpleNamespace(file=SimpleNamespace(src_uri=page), meta={})
    return hooks.on_page_markdown(markdown, there, None, None)


def test_blocks_of_included_pages_stay_closed(hooks):
    """Only a block without a language becomes text; the end of another one is no beginning."""
    markdown = "```sh\nmake\n```\n\n## Words\n\n```\nplain\n```\n"
    assert as_page(hooks, "contributing.md", markdown) == "```sh\nmake\n```\n\n## Words\n\n```text\nplain\n```\n"


def headings(markdown: str) -> list[str]:
    """Lines that are headings: outside of blocks, which a line of three backticks alone closes."""
    found, inside = [], False
    for line in markdown.splitlines():
        if line.startswith("```"):
            inside = not inside or line != "```"
        elif line.startswith("## ") and not inside:
            found.append(line)
    return found


def test_no_included_page_loses_a_heading(hooks):
    for page, source in hooks.INCLUDED.items():
        if page.endswith(".md"):
            markdown = (ROOT / source).read_text()
            assert headings(as_page(hooks, page, markdown)) == headings(markdown) != [], page


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("gather_tokens", "<code>gather_<wbr>tokens</code>"),
        ("_checked", "<code>_checked</code>"),
        ("ops/&lt;op&gt;/__init__.py", "<code>ops/<wbr>&lt;op&gt;/<wbr>__init__.py</code>"),
        ("--preset {mae-vit-b,mae-vit-l}", '<code class="long">--preset {mae-vit-b,<wbr>mae-vit-l}</code>'),
    ],
)
def test_code_in_tables_breaks_at_joints(hooks, code, shown):
    page = f"<p><code>{code}</code></p><table><tr><td>a <code>{code}</code></td></tr></table>"
    assert hooks.on_post_page(page, None, None) == page.replace(f"a <code>{code}</code>", f"a {shown}"), (
        "and nowhere else"
    )
