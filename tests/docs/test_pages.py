"""The pages are whole: nothing that the library has is missing on them, and what they show is there."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mimkernels
from mimkernels.commands.bench.plot import measured
from mimkernels.commands.bench.results import read_reports
from mimkernels.heads import PRESETS, QUANTITIES
from mimkernels.nn import poolings
from mimkernels.ops._registry import SPECS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def test_tables_show_the_committed_results_and_the_options_of_commands():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.write_tables", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_statistic_has_a_formula_a_source_and_a_picture():
    page = (DOCS / "heads" / "index.md").read_text()
    for name in QUANTITIES:
        section = re.search(rf"^### {name} \{{.*?^</div>\n\n!\[.*?\n\n</div>", page, flags=re.M | re.S).group()
        assert "```text\n" in section and "\nSource: " in section and f"(../pictures/heads/{name}.png)" in section
    assert sorted(re.findall(r"^### (\w+)", page, flags=re.M)) == sorted(QUANTITIES)


def test_every_preset_and_its_quantities_are_described():
    page = (DOCS / "heads" / "presets.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, flags=re.M) == list(PRESETS)


def test_every_op_is_listed_and_shown_from_its_docstring():
    shown = "\n".join(page.read_text() for page in (DOCS / "ops").glob("*.md"))
    ops = {*SPECS, *(name for name in mimkernels.__all__ if (ROOT / "mimkernels" / "ops" / name).is_dir())}
    for op in ops:
        assert f"::: mimkernels.ops.{op}.api.{op}\n" in shown and f"[`{op}`]" in shown, op


def test_every_pooling_is_described():
    page = (DOCS / "howto" / "probe.md").read_text()
    for name in poolings():
        assert f"`{name}`" in page, name


PUBLIC = ["", ".heads", ".nn", ".models", ".data.masks", ".integrations.timm", ".integrations.transformers"]


@pytest.mark.parametrize("module", [f"mimkernels{name}" for name in PUBLIC])
def test_every_public_name_has_its_place_on_a_page(module):
    """Functions and classes by their docstrings, data by their names."""
    if module.startswith(("mimkernels.models", "mimkernels.integrations")):
        pytest.importorskip(module.rpartition(".")[2] if "integrations" in module else "timm")
    pages = "\n".join(page.read_text() for page in DOCS.rglob("*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", pages, flags=re.M))
    public = importlib.import_module(module)
    for name in public.__all__:
        thing = getattr(public, name)
        home = getattr(thing, "__module__", None)
        if isinstance(home, str) and home.startswith("mimkernels"):
            assert {home, f"{home}.{name}"} & shown, f"{module}.{name} is on no page"
        elif name != "__version__":
            assert re.search(rf"`(?:mimkernels\.[\w.]+\.)?{name}`", pages), f"{module}.{name} is on no page"


PAGES = ["README.md", "CONTRIBUTING.md", *(str(page.relative_to(ROOT)) for page in sorted(DOCS.rglob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page):
    named = re.findall(r"`((?:mimkernels|csrc|tests|benchmarks|examples|docs)/[\w./-]+)`", (ROOT / page).read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_page_is_in_the_navigation_once():
    nav = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])
    assert len(nav) == len(set(nav))
    assert {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} <= set(nav)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_the_root_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_pictures_are_small_and_shown():
    pages = [ROOT / "README.md", *DOCS.rglob("*.md")]
    shown = {
        (page.parent / path).resolve() for page in pages for path in re.findall(r"\]\(([^)]+\.png)\)", page.read_text())
    }
    for picture in (DOCS / "pictures").rglob("*.png"):
        assert picture in shown, picture
        assert picture.stat().st_size < (300_000 if picture.name.startswith("report-") else 150_000), picture


def test_the_picture_of_the_figures_shows_the_committed_results():
    """As the tables beside it do; `mimkernels bench plot FOLDER` draws it again."""
    image = pytest.importorskip("PIL.Image")
    (source,) = re.findall(r"benchmarks/results/[\w-]+/speedups\.png", (DOCS / "hooks.py").read_text())
    with image.open(ROOT / source) as picture:
        assert picture.info["Comment"] == measured(read_reports((ROOT / source).parent))


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_types_of_every_public_function_are_checked_as_a_user_sees_them():
    """`make lint` checks this file as ``mypy --strict`` does."""
    text = (ROOT / "tests" / "typing" / "user.py").read_text()
    functions = [name for name in mimkernels.__all__ if name.islower() and not name.startswith("__")]
    assert [name for name in functions if not re.search(rf"\b{name}\(", text)] == []
