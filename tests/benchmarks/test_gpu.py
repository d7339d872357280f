"""``python -m benchmarks gpu`` without a GPU: its runner, its lines, and what is read from them."""

import json
import os
import sys
import tarfile
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("timm")

from benchmarks import gpu, tune_attention
from benchmarks.gpu_stages import contract, profilers
from benchmarks.gpu_stages import triton as triton_stage
from benchmarks.gpu_stages.reader import report
from benchmarks.gpu_stages.target import Target, lost, medians, noted, read, rounds_for, sets_for
from mimkernels import testing


def timing(stage, case, version, us, **more):
    return {"stage": stage, "case": case, "version": version, "us": us, **more}


def test_the_stages_fit_their_runs():
    assert sum(stage.seconds for stage in gpu.FIRST) == gpu.SECONDS == 450
    assert sum(stage.seconds for stage in gpu.AGAIN) == gpu.SECOND == 150


def test_a_stage_is_killed_with_all_that_it_started_and_the_next_one_runs(tmp_path, monkeypatch):
    child = "import os, time; open('child', 'w').write(str(os.getpid())); time.sleep(600)"
    stuck = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    codes = {
        "stuck": f"import os; os.chdir({str(tmp_path)!r}); {stuck}",
        "fails": "raise SystemExit(3)",
        "well": "print(1)",
    }
    monkeypatch.setattr(gpu, "_command", lambda stage, output, rehearsal: [sys.executable, "-c", codes[stage.name]])
    monkeypatch.setattr(gpu, "_GRACE", 0.2)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu, "_REHEARSED", 1.0)
    planned = [gpu.Stage(name, 3, "") for name in codes]
    assert gpu.run(planned, tmp_path, seconds=60, rehearsal=True) == 1
    lines = {line["case"]: line["state"] for line in read(tmp_path / "results.jsonl")}
    assert lines == {"stuck": "out of time", "fails": "ended with 3", "well": "ended well"}
    deadline = time.monotonic() + 5
    number = int((tmp_path / "child").read_text())
    while time.monotonic() < deadline and _alive(number):
        time.sleep(0.05)
    assert not _alive(number)
    assert "out of time" in (tmp_path / "report.md").read_text() and "==> " in (tmp_path / "log.txt").read_text()
    with tarfile.open(tmp_path / "rest.tar.gz") as archive:
        assert archive.getnames() == []


def test_a_run_keeps_the_lines_of_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_command", lambda *_: [sys.executable, "-c", ""])
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    for name in ("first", "second"):
        gpu.run([gpu.Stage(name, 20, "")], tmp_path, seconds=60, rehearsal=True)
    kept = {file: read(tmp_path / file)[0]["case"] for file in ("results.before.jsonl", "results.jsonl")}
    assert kept == {"results.before.jsonl": "first", "results.jsonl": "second"}


@pytest.mark.parametrize("nvcc", [True, False])
def test_a_library_that_cannot_be_measured_is_built_or_said_to_be_there(nvcc, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_command", lambda *_: [sys.executable, "-c", ""])
    monkeypatch.setattr(gpu, "_architecture", lambda: "")
    monkeypatch.setattr(gpu, "_has_nvcc", lambda: nvcc)
    monkeypatch.setattr(gpu, "_unusable", lambda: "it has PTX for this device, not machine code")
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    assert gpu.run([gpu.Stage("floors", 20, "")], tmp_path, seconds=60, rehearsal=False) == 1
    states = {line["case"]: line["state"] for line in read(tmp_path / "results.jsonl")}
    said = "ended well, but no CUDA library runs" if nvcc else "no nvcc; the library that is here"
    assert list(states) == ["build", "floors"] and states["build"].startswith(f"{said}: it has PTX")
    assert "not machine code" in (tmp_path / "report.md").read_text()


def test_every_stage_has_a_function_that_runs_it():
    from importlib import import_module

    names = {stage.name for stage in (*gpu.FIRST, *gpu.AGAIN)} | {"contract-worker", "profiled", "small"}
    assert names == set(gpu._RUN_BY)
    for module, function in gpu._RUN_BY.values():
        assert callable(getattr(import_module(f"benchmarks.gpu_stages.{module}"), function))


def test_a_tool_ends_before_its_stage_does():
    seconds = {stage.name: stage.seconds for stage in gpu.FIRST}
    importing = 8  # seconds, of all that a stage's own process needs
    assert profilers.SECONDS["ncu"] + importing < seconds["ncu"]
    assert sum(profilers.SECONDS[tool] for tool in profilers.TOOLS) + importing < seconds["sanitizer"]


def test_without_a_gpu_the_rehearsal_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu", "--output", str(tmp_path)])
    monkeypatch.setattr(gpu, "_has_device", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main()
    assert "torch sees no GPU here; --rehearse runs without one" in capsys.readouterr().err


def test_a_kernel_that_compiles_for_ages_does_not_keep_the_others_from_being_timed(tmp_path, monkeypatch):
    popen = triton_stage.subprocess.Popen

    def worker(command, **options):
        ages = command[-1].startswith("triton-compile:0/")
        return popen([sys.executable, "-c", f"import time; time.sleep({600 if ages else 0})"], **options)

    monkeypatch.setattr(triton_stage.subprocess, "Popen", worker)
    monkeypatch.setattr(triton_stage.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(triton_stage, "_COMPILING", 3.0)
    target = Target(tmp_path)
    triton_stage._compile(target)
    (line,) = read(target.results)
    assert line["statuses"][0] == -9 and len(line["statuses"]) == 2 and line["s"] < 60


def _alive(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{number}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_kernel_that_takes_the_device_costs_one_case(tmp_path, monkeypatch):
    target = Target(tmp_path, rehearsal=True)
    cases = [testing.Case("gather_tokens", name, dict) for name in ("first", "deadly", "wrong", "last")]
    monkeypatch.setattr(contract, "planned", lambda target: [(case, torch.float32) for case in cases])

    def check(case, *_):
        if case.label == "deadly":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        assert case.label != "wrong", "error 3e-2 against the oracle"

    def worker(command):
        try:
            contract.work(target)
        except RuntimeError:
            return SimpleNamespace(returncode=1)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(testing, "check", check)
    monkeypatch.setattr(contract.subprocess, "run", worker)
    contract.run(target)
    last = {line["case"]: line for line in read(target.results)}
    states = {"first": "right", "deadly": "failed", "wrong": "wrong", "last": "right"}
    assert {case: line["state"] for case, line in last.items()} == {
        f"gather_tokens-{k}-float32": v for k, v in states.items()
    }
    said = report(read(target.results))
    assert "| gather_tokens | 2 | 1 | 1 | 0 |" in said and "error 3e-2 against the oracle" in said


def test_a_worker_that_does_nothing_ends_the_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(contract.subprocess, "run", lambda command: SimpleNamespace(returncode=1))
    with pytest.raises(RuntimeError, match="status 1 and did no case"):
        contract.run(Target(tmp_path, rehearsal=True))


def test_what_a_case_raises_becomes_its_line(tmp_path):
    target = Target(tmp_path, rehearsal=True)
    with noted(target, "memory", "a"):
        raise ValueError("no such thing")
    with pytest.raises(RuntimeError), noted(target, "memory", "b"):
        raise RuntimeError("CUDA error: misaligned address")
    assert [line["error"][:12] for line in read(target.results)] == ["ValueError: ", "RuntimeError"]
    assert not lost(RuntimeError("No available kernel")) and not lost(AssertionError("misaligned address"))


def test_versions_are_timed_in_turns_over_all_sets(tmp_path):
    calls = []
    versions = {name: [lambda name=name, k=k: calls.append((name, k)) for k in range(3)] for name in "ab"}
    rehearsal, device = Target(tmp_path, rehearsal=True), Target(tmp_path)
    timings = medians(versions, rehearsal)
    assert {name: t["rounds"] for name, t in timings.items()} == {"a": 2, "b": 2}
    # To warm up, to see how long it takes, and the rounds: each time all the sets.
    assert all(calls.count((name, k)) == 4 for name in "ab" for k in range(3))
    assert [rounds_for(once, 0.4, device) for once in (0.0, 1e-4, 0.02, 0.1)] == [60, 60, 20, 5]
    assert [sets_for(n, device) for n in (None, 1, 100 * 2**20, 2**30)] == [4, 4, 3, 2]
    assert {sets_for(n, rehearsal) for n in (None, 2**30)} == {2}


def test_a_line_that_was_cut_is_left_out(tmp_path):
    target = Target(tmp_path)
    target.add("floors", "copy", us=1.0)
    with target.results.open("a") as file:
        file.write('{"stage": "floors", "ca')
    assert [line["case"] for line in read(target.results)] == ["copy"]


def test_priorities_follow_the_times():
    def both(kind, shape, triton, cuda):
        case = f"{kind}, {shape}"
        return [timing("triton", case, name, us, kind=kind) for name, us in (("triton", triton), ("cuda", cuda))]

    lines = [
        *both("restore", "B=64", 10.0, 20.0), *both("restore", "B=256", 30.0, 60.0),
        *both("pool", "B=64", 30.0, 20.0), *both("pool", "B=256", 20.0, 40.0),
        *both("fill", "B=64", 10.0, 10.2),
        {"stage": "triton", "case": "x", "entry": "e", "blocks": "(64, 64, 4, 1)", "best_us": 9.0, "committed": False},
        {"stage": "triton", "case": "y", "entry": "e", "blocks": "(128, 64, 8, 1)", "best_us": 7.0, "committed": True},
    ]  # fmt: skip
    said = report(lines)
    assert "- restore: triton (triton takes 0.50 of cuda's time)" in said
    assert "- pool: by shape: cuda for pool, B=64; triton for pool, B=256" in said
    assert "- fill: either (triton takes 0.98 of cuda's time)" in said
    assert "- block sizes of e: (128, 64, 8, 1) (7.0 us, as committed)" in said


def test_attention_is_held_against_the_fastest_and_the_estimates():
    case = "forward, B=256 H=12 N=197 D=64"
    lines = [
        timing("attention", case, name, us, kind="forward", graph=True)
        for name, us in (
            ("bare, one-strip", 90.0),
            ("all statistics, one-strip", 300.0),
            ("bare", 90.0),
            ("flash", 183.0),
            ("cudnn", 150.0),
        )
    ]
    lines += [
        {"stage": "step", "case": "MAE step, vit_base_patch16_224 B=256", "version": "ours", "ms": 70.0, "images": 256,
         "peak_mib": 1.0},
        {"stage": "attention", "case": case, "version": "efficient", "missing": "No available kernel"},
    ]  # fmt: skip
    said = report(lines)
    assert "| cudnn | bare, one-strip 0.60, all statistics, one-strip 2.00, bare 0.60 |" in said
    assert (
        "| forward, N = 197, bare, one-strip | 120 to 150 us | 90.0 us | as estimated |" in said
    )  # a quarter below 120
    assert "| forward, N = 197, all statistics, one-strip | 250 to 350 us | 300.0 us | as estimated |" in said
    assert "| forward, N = 197, bare | 90 to 90 us | 90.0 us | as estimated |" in said
    assert "| step, ours | 46.5 ms | 70.0 ms | refuted: slower |" in said
    assert "efficient: No available kernel" in said
    slower = report([timing("attention", case, "bare, one-strip", 89.9, kind="forward")])
    assert "refuted: faster" in slower and "launches included" not in slower


def test_an_unknown_stage_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--only", "attenton"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no stage attenton; there are floors, contract, attention" in capsys.readouterr().err


@pytest.mark.parametrize("kernel", ["forward", "masked", "dq", "companion"])
@pytest.mark.parametrize("extra", [False, True])
def test_the_calls_that_are_tuned_bind(kernel, extra, monkeypatch):
    monkeypatch.setattr(tune_attention, "DEVICE", "cpu")  # where Triton's interpreter runs
    monkeypatch.setattr(tune_attention, "TOKENS_IN_ALL", 1)
    tune_attention.calls(kernel, "fp32", 8, 4, extra)()


def test_the_lines_are_whole_and_soon_there(tmp_path):
    target = Target(tmp_path)
    target.add("attention", "a", us=1.5, kind="forward")
    (line,) = (json.loads(text) for text in target.results.read_text().splitlines())
    assert line.keys() == {"stage", "case", "at", "us", "kind"}
