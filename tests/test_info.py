"""`mimkernels info` and the command line around it."""

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from mimkernels import cli, info
from mimkernels.ops import _native, _registry


def test_info_names_every_library_backend_and_op():
    facts = info.collect()
    emulated = ["cuda_emulated"] if _native.has_emulation() else []  # in source trees only
    assert [library["name"] for library in facts["libraries"]] == ["cpu", "cuda", *emulated, "masks"]
    assert [backend["name"] for backend in facts["backends"]] == list(_registry.BACKENDS)
    assert set(facts["ops"]) == set(_registry.SPECS)
    assert facts["versions"]["torch"] and facts["devices"][0]["name"] == "cpu"


def test_whatever_is_missing_has_a_reason_and_a_remedy():
    facts = info.collect()
    for part in (*facts["libraries"], *facts["backends"]):
        there = part.get("loaded", part.get("available"))
        assert there == (part["reason"] is None), part
        assert there or part["remedy"], part


def test_freed_memory_is_told_of(monkeypatch, capsys):
    monkeypatch.setattr(info, "freed_memory", lambda: ("returned", "keep_freed_memory() would pay"))
    monkeypatch.setenv("NO_COLOR", "1")
    assert info.collect()["memory"] == {"freed_memory": "returned", "detail": "keep_freed_memory() would pay"}
    assert cli.main(["info"]) == 0
    assert "freed memory  returned  keep_freed_memory() would pay" in capsys.readouterr().out


def test_missing_parts_are_printed(monkeypatch, capsys):
    gone = replace(_native.library("cpu"), loaded=False, reason="not built: no compiler", remedy="install g++")
    monkeypatch.setitem(_native._LIBRARIES, "cpu", gone)
    monkeypatch.setitem(_registry._UNAVAILABLE, "cpu", gone.reason)
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("not built: no compiler") == 1, "once, not again for the backend"
    assert "remedy: install g++" in printed


def test_libraries_that_share_a_reason_are_told_of_once(monkeypatch, capsys):
    for name in ("cpu", "cuda"):
        gone = replace(_native.library(name), loaded=False, reason="not built: off", remedy="unset it")
        monkeypatch.setitem(_native._LIBRARIES, name, gone)
        monkeypatch.setitem(_registry._UNAVAILABLE, name, gone.reason)
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "cpu, cuda libraries: not built: off\n  remedy: unset it\n" in printed
    assert printed.count("not built: off") == 1


def test_every_package_of_the_extra_is_looked_for():
    with open(Path(__file__).resolve().parents[1] / "pyproject.toml", "rb") as file:
        extra = tomllib.load(file)["project"]["optional-dependencies"]["train"]
    assert [re.match(r"[\w-]+", requirement)[0] for requirement in extra] == list(info._TRAIN)


def test_json_is_the_collected_facts(capsys):
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(info.collect()))


def test_info_needs_only_torch():
    code = (
        "import sys\n"
        "for name in ('rich', 'timm', 'torchvision', 'accelerate', 'matplotlib', 'sklearn', 'tensorboard'):\n"
        "    sys.modules[name] = None\n"
        "from mimkernels import cli\n"
        "sys.exit(cli.main(['info']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Native libraries" in done.stdout


def test_the_module_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "mimkernels", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("mimkernels ")


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"]])
def test_help_exits_cleanly(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    assert "mimkernels" in capsys.readouterr().out


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)


def test_the_bare_command_shows_its_help(capsys):
    assert cli.main([]) == 2
    printed = capsys.readouterr().err
    assert all(command.help.split(":")[0] in " ".join(printed.split()) for command in cli.COMMANDS.values())


def test_a_missing_package_is_named_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "not_there", None)
    monkeypatch.setattr(cli, "COMMANDS", {"info": cli.Command("not_there", "")})
    assert cli.main(["info"]) == 1
    assert "mimkernels[train]" in capsys.readouterr().err
