import json
import re
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
from markupsafe import Markup

import mimkernels
from mimkernels import _palette
from mimkernels.engine.page import render, write_page

BENCH = "commands/bench/templates/report.html"
TEMPLATES = sorted(Path(mimkernels.__file__).parent.rglob("templates/*"))


def picture(**changes) -> dict:
    return {"name": "speedups", "note": "longer is better", "address": "data:image/png;base64,AA==", **changes}


def test_values_are_escaped_but_markup_is_not():
    page = render(BENCH, title="<b>", lead="a & b", pictures=[picture(name='"x"', note=Markup("<svg></svg>"))])
    assert "<title>&lt;b&gt;</title>" in page and "a &amp; b" in page
    assert 'alt="&#34;x&#34;"' in page and "<svg></svg>" in page


def test_without_matplotlib_commands_are_refused_before_they_work(tmp_path):
    """Their pages need figures, and would fail when everything else is done."""
    name = "vit_tiny_patch16_224"
    commands = [
        ["pretrain"],
        ["probe", "--model", name],
        ["finetune", "--model", name],
        ["analyze", name],
        ["dense", name],
    ]
    code = (
        "import json, sys; sys.modules['matplotlib'] = None; from mimkernels import cli\n"
        "print([cli.main([*command, '--output', sys.argv[2]]) for command in json.loads(sys.argv[1])])"
    )
    run = [sys.executable, "-c", code, json.dumps(commands), str(tmp_path / "run")]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.stdout == "[2, 2, 2, 2, 2]\n", done.stderr
    assert done.stderr.count("'matplotlib'") == done.stderr.count("mimkernels[train]") == len(commands)
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_is_not_given_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="'lead' is undefined"):
        render(BENCH, title="x", pictures=[])


def test_a_page_is_one_whole_file_without_outside_references(tmp_path):
    path = write_page(tmp_path / "page.html", BENCH, title="x", lead="caf\udce9", pictures=[picture()])
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert f"--accent:{_palette.ACCENT};" in page and f"mimkernels {mimkernels.__version__} on " in page
    assert r"caf\udce9" in page
    assert not re.search(r"(src|href)=(?!\"data:)|<link|<script|@import|url\(", page)


def test_every_colour_is_the_palette_s():
    assert len(TEMPLATES) >= 9
    for path in TEMPLATES:
        assert not re.search(r"#[0-9a-fA-F]{3,8}\b", path.read_text()), path
