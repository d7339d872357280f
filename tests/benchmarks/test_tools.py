"""``python -m benchmarks``: one door to every tool of the checkout."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("timm")

from benchmarks import __main__ as door
from benchmarks import compare_revisions

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_help_lists_every_module_of_the_folder():
    shown = run("--help").stdout
    modules = {path.stem.replace("_", "-") for path in (ROOT / "benchmarks").glob("[a-z]*.py")}
    assert set(door.tools()) == modules >= {"gpu", "tune-attention", "timm-sweep", "kill-runs", "compare-revisions"}
    for name, (_, words) in door.tools().items():
        assert words and any(line.split() == [name, *words.split()] for line in shown.splitlines()), name


@pytest.mark.parametrize("name", [name for name in door.tools() if name != "tune-attention"])
def test_a_tool_runs_from_the_door(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", sys.argv)  # put back at the end
    with pytest.raises(SystemExit) as left:
        door.main([name, "--help"])
    assert left.value.code == 0 and capsys.readouterr().out.startswith(f"usage: python -m benchmarks {name} ")


def test_a_tool_is_imported_when_it_runs():
    code = "import sys, benchmarks.__main__ as door; door.tools(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_unknown_tools_and_revisions_are_refused():
    done = run("no-such-tool")
    assert done.returncode == 2 and "no-such-tool" in done.stderr
    done = run("compare-revisions", "no-such-revision", "HEAD")
    assert done.returncode == 2 and "'no-such-revision' is no git revision" in done.stderr


def test_revisions_are_measured_in_turns(tmp_path, monkeypatch):
    trees = []

    def measured(tree, output, options):
        trees.append(tree.name)
        return output

    monkeypatch.setattr(compare_revisions, "_git", lambda *arguments, cwd=None: str(tmp_path))
    monkeypatch.setattr(compare_revisions, "_build", lambda tree, root: None)
    monkeypatch.setattr(compare_revisions, "_measure", measured)
    monkeypatch.setattr(compare_revisions, "read", lambda *places: len(places))
    monkeypatch.setattr(compare_revisions, "compare", lambda before, after: (before, after))
    options = SimpleNamespace(before="a", after="b", repeat=3)
    assert compare_revisions.compare_revisions(options) == (3, 3)
    assert trees == 3 * ["before", "after"]
