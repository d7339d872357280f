"""What the site shows of files that lie elsewhere in the repository, and links between them."""

import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# Page or picture of the site: the file that it is.
INCLUDED = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "performance-notes.md": "benchmarks/NOTES.md",
    "design/native.md": "csrc/README.md",
    "design/emulation.md": "csrc/emulation/README.md",
    "pictures/speedups.png": "benchmarks/results/amd-epyc-2-threads-avx2/speedups.png",
}
WIDE = ("TIMM.md",)  # tables that need the whole width
PAGE_OF = {source: page for page, source in INCLUDED.items()}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
FENCED = re.compile(r"^```(\w*)\n(.*?^```)$", re.MULTILINE | re.DOTALL)  # a whole block: its language, and the rest
CELL = re.compile(r"<t[dh][ >].*?</t[dh]>", re.DOTALL)
CODE = re.compile(r"<code>([^<]+)</code>")
# Where names and paths may be broken: behind a slash, comma or equals sign, or an underscore within a name.
JOINT = re.compile(r"(?<=[A-Za-z0-9;)*]/)(?=\S)|(?<=[A-Za-z0-9;)*][_,=])(?=[A-Za-z0-9&-])")
LONG = 28  # characters of code that a table does not keep on one line, even where there is room


def on_files(files, config):
    for page, source in INCLUDED.items():
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of an included file: to the page of the file they mean, or its path as text where it has none."""
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["navigation", "toc"]
    source = INCLUDED.get(page.file.src_uri)
    if source is None:
        return markdown
    markdown = FENCED.sub(lambda block: f"```{block[1] or 'text'}\n{block[2]}", markdown)

    def moved(match):
        text, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        to = PAGE_OF.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if to is None:
            return text if path in text else f"{text} (`{path}`)"
        return f"[{text}]({posixpath.relpath(to, posixpath.dirname(page.file.src_uri) or '.')}{anchor or ''})"

    return LINK.sub(moved, markdown)


def on_page_content(html, page, config, files):
    """Docstrings introduce code with two colons."""
    return html.replace("::</p>", ":</p>")


def on_post_page(output, page, config):
    """Code in tables may be broken where a name or path has its joints, and nowhere else.

    After the page is indexed: a break within a name would hide it from the search.
    """

    def jointed(code):
        kind = ' class="long"' if len(code[1]) > LONG else ""
        return f"<code{kind}>{JOINT.sub('<wbr>', code[1])}</code>"

    return CELL.sub(lambda cell: CODE.sub(jointed, cell[0]), output)


def on_post_build(config):
    """The site loads nothing from elsewhere."""
    for page in sorted(Path(config.site_dir).rglob("*.html")):
        foreign = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"https?://[^>]*", page.read_text())
        if foreign:
            raise PluginError(f"{page} loads from elsewhere: {foreign[0]}")
