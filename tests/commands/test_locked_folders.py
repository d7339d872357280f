"""One run at a time in a folder that has a name, whichever command it is of."""

import argparse
import importlib
import os
import re
import subprocess
import sys

import pytest

from mimkernels.commands.analyze.config import AnalyzeConfig
from mimkernels.commands.analyze.run import AnalyzeRun
from mimkernels.commands.demo.run import prepare_demo
from mimkernels.commands.dense.config import DenseConfig
from mimkernels.commands.dense.run import DenseRun
from mimkernels.commands.finetune.config import FinetuneConfig
from mimkernels.commands.finetune.run import FinetuneRun
from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.run import Run, pretrain
from mimkernels.commands.probe.config import ProbeConfig
from mimkernels.commands.probe.run import ProbeRun, probe
from mimkernels.engine.checkpoint import load
from mimkernels.engine.lock import folder_lock
from mimkernels.engine.training.history import read_entries
from mimkernels.engine.training.loop import Trainer
from tests.engine.test_lock import in_use


def test_a_second_run_is_refused_and_the_first_unharmed(tiny, tmp_path, monkeypatch):
    pretrain(tiny(epochs=2, output=str(tmp_path / "alone")))
    config, refused = tiny(epochs=2, save_every=0.4), []
    step = Trainer._train_step

    def meanwhile(self, batches):
        if self.step == 3:
            for options in ({}, {"overwrite": True}, {"resume": "auto"}):
                with pytest.raises(ValueError, match=in_use()) as caught:
                    pretrain(tiny(epochs=2, seed=1 if "overwrite" in options else 0), **options)
                refused.append(str(caught.value))
        step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", meanwhile)
    pretrain(config)
    assert len(refused) == 3 and str(tmp_path / "run") in refused[0]
    runs = [tmp_path / name for name in ("alone", "run")]
    one, other = (load(run / "checkpoints" / "final.pt")["model"] for run in runs)
    assert all((one[name] == other[name]).all() for name in one)
    assert [entry["loss"] for entry in read_entries(runs[0] / "metrics.jsonl")] == [
        entry["loss"] for entry in read_entries(runs[1] / "metrics.jsonl")
    ]
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_second_probe_is_refused(tiny, tmp_path):
    config = ProbeConfig(model="vit_tiny_patch16_224", pretrained=False, output=str(tmp_path / "probe"))
    with folder_lock(config.output), pytest.raises(ValueError, match=in_use()):
        probe(config)
    assert not (tmp_path / "probe").exists()


def test_of_several_processes_only_the_first_locks(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with folder_lock(tmp_path / "run"):
        Run(tiny())


def test_a_refused_run_leaves_no_folder_and_no_lock(tiny, tmp_path):
    with pytest.raises(ValueError, match="timm has no model"):
        pretrain(tiny(model="vit_nothing", output=str(tmp_path / "a" / "b")))
    assert os.listdir(tmp_path) == []
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="timm has no model"):
        pretrain(tiny(model="vit_nothing"))
    assert os.listdir(tmp_path / "run") == []


def test_the_command_says_who_is_at_work(tmp_path):
    with folder_lock(tmp_path / "run"):
        done = subprocess.run(
            [sys.executable, "-m", "mimkernels", "pretrain", "--data", "digits", "--output", str(tmp_path / "run")],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.search(in_use(), done.stderr) and done.stderr.startswith("mimkernels: error: output")


_NAME = "vit_tiny_patch16_224"


@pytest.mark.parametrize(
    "prepare",
    [
        lambda: Run(PretrainConfig(output="")),
        lambda: prepare_demo("", None),
        lambda: FinetuneRun(FinetuneConfig(model=_NAME, pretrained=False, output="")),
        lambda: ProbeRun(ProbeConfig(model=_NAME, pretrained=False, output="")),
        lambda: AnalyzeRun(AnalyzeConfig(models=[f"{_NAME}:pretrained=false"], data="digits", output="")),
        lambda: DenseRun(DenseConfig(models=[f"{_NAME}:pretrained=false"], output="")),
    ],
    ids=["pretrain", "demo", "finetune", "probe", "analyze", "dense"],
)
def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch, prepare):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^output is empty: name a folder"):
        prepare()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["run", "plot"])
def test_bench_refuses_an_empty_name(capsys, command):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"mimkernels.commands.bench.{command}").add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--output", ""])
    assert "argument --output: it is empty: name a folder" in capsys.readouterr().err
