"""Two processes on one machine, started as a user would; gloo on the CPU."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.run import pretrain
from mimkernels.engine.checkpoint import load
from mimkernels.engine.training.history import read_entries
from tests.once import once

ROOT = Path(__file__).parents[3]
_SIMMIM = {"method": "simmim", "mask_unit": 4, "decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}
_FEATURES = {**_SIMMIM, "masking": "block", "mask_ratio": 0.4, "pictures": 0, "val_images": 16}
_TEACHER = "vit_tiny_patch16_224:pretrained=false,patch_size=8,embed_dim=16,depth=1,num_heads=2"
METHODS = {
    "mae": {},
    "simmim-beit": {**_SIMMIM, "model": "beit_base_patch16_224"},
    "simmim-swinv2": {
        **_SIMMIM, "model": "swinv2_tiny_window8_256", "patch_size": 2,
        "model_kwargs": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    },
    "features": {**_FEATURES, "target": f"features:{_TEACHER}"},
    "ema": {**_FEATURES, "target": "ema:layers=1", "momentum": 0.5},
    "bootstrap": {**_FEATURES, "target": "0.5*pixels + bootstrap"},
}  # fmt: skip
BY_TWO = ("mae", "simmim-swinv2", "features", "ema", "bootstrap")
SHARDED = {
    "mae": "['FSDPBlock', 'FSDPFusedDecoderBlock'",
    "simmim-beit": "['FSDPBlock', 'FSDPSimMIM']",
}
SETTINGS = {"batch_size": 150, "epochs": 2, "save_every": 1.0, "pictures": 2}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def options(config) -> list[str]:
    words = []
    for name, value in config.to_dict().items():
        option = "--" + name.replace("_", "-")
        if value is None or value in ("", {}):
            continue
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            words += [option, *(f"{key}={item}" for key, item in value.items())]
        else:
            words += [option, str(value)]
    return words


def launch(parts: list[list[str]], *, expect: int = 0, module: str = "in_turn", **environment: str) -> list[str]:
    """Run the parts in turn in two processes; returns what each part printed."""
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    words = [word for part in parts for word in ("then", *part)][1:]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", f"tests.commands.pretrain.{module}", *words],
        env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    _, *printed = re.split(r"^in turn: .*\n", done.stdout, flags=re.M)
    assert len(printed) == len(parts), done.stdout + done.stderr
    return [*printed[:-1], printed[-1] + done.stderr]


def losses(folder, name="loss") -> list[float]:
    return [entry[name] for entry in read_entries(folder / "metrics.jsonl") if name in entry]


def assert_same_training(one, two):
    assert losses(two) == pytest.approx(losses(one), rel=2e-5)
    assert losses(two, "val_loss") == pytest.approx(losses(one, "val_loss"), rel=2e-5)
    assert len(losses(one, "val_loss")) == SETTINGS["epochs"]
    a, b = (load(folder / "checkpoints" / "final.pt") for folder in (one, two))
    for name, value in a["model"].items():
        torch.testing.assert_close(b["model"][name], value, rtol=1e-3, atol=2e-5)


@pytest.fixture(scope="module")
def of_method(tiny_settings):
    """Settings of the runs of this file."""

    def make(method: str, output: Path, **changes) -> PretrainConfig:
        return PretrainConfig(**{**tiny_settings, **SETTINGS, **METHODS[method], "output": str(output), **changes})

    return make


@pytest.fixture(scope="module")
def by_two(of_method, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A folder of runs by two processes, and what they printed.

    One run of every method, another of MAE from the end of its first epoch, and one that cannot begin.
    """

    def run() -> tuple[Path, dict[str, str]]:
        folder = tmp_path_factory.mktemp("two")
        parts = {method: options(of_method(method, folder / method)) for method in BY_TWO}
        parts["copy"] = ["copy", str(folder / "mae"), str(folder / "again")]
        parts["again"] = ["--output", str(folder / "again"), "--resume"]
        parts["bad"] = options(of_method("mae", folder / "bad", data=str(folder / "nowhere")))
        return folder, dict(zip(parts, launch(list(parts.values()), expect=1), strict=True))

    return once(tmp_path_factory, "by-two", run)


@pytest.mark.parametrize("method", BY_TWO)
def test_two_processes_train_as_one(by_two, of_method, tmp_path, method):
    folder, printed = by_two
    out, two = printed[method], folder / method
    pretrain(of_method(method, tmp_path / "one", accum_steps=2))
    assert len(re.findall(r"saved .*step-00000005\.pt", out)) == 1 and len(re.findall(r"saved .*final\.pt", out)) == 1
    assert len(re.findall(r"^Device .*2 processes", out, re.M)) == 1
    assert_same_training(tmp_path / "one", two)
    assert (two / "report.html").exists()
    a, b = (load(run / "checkpoints" / "final.pt") for run in (tmp_path / "one", two))
    assert len(re.findall(r"^Target .*features of", out, re.M)) == (method in ("features", "ema", "bootstrap"))
    assert a.get("teachers") == b.get("teachers") and bool(a.get("teachers")) == (method == "features")
    assert ("target_teacher" in a) == ("target_teacher" in b) == (method in ("ema", "bootstrap"))
    for name, value in a.get("target_teacher", {}).items():
        torch.testing.assert_close(b["target_teacher"][name], value, rtol=1e-3, atol=2e-5)


def test_two_processes_continue_as_two(by_two, of_method):
    """From the end of the first epoch. A run of SimMIM is continued below, sharded."""
    folder, printed = by_two
    assert "continuing at step 5" in printed["again"]
    assert_same_training(folder / "mae", folder / "again")
    assert (folder / "again" / "report.html").exists()


def test_bad_input_ends_every_process(by_two):
    folder, printed = by_two
    assert "mimkernels: error: image folder" in printed["bad"]
    assert not (folder / "bad").exists()


@pytest.fixture(scope="module")
def sharded(of_method, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A folder of runs of one process, and of the same, continued by FSDP2 from the end of the first epoch, and what
    these printed."""

    def run() -> tuple[Path, dict[str, str]]:
        folder = tmp_path_factory.mktemp("sharded")
        parts = {}
        for method in SHARDED:
            one, two = folder / "one" / method, folder / "two" / method
            pretrain(of_method(method, one, accum_steps=2))
            shutil.copytree(one, two, ignore=shutil.ignore_patterns("final.pt"))
            parts[method] = ["--output", str(two), "--resume", "--accum-steps", "1"]
        printed = launch(
            list(parts.values()),
            module="sharded_on_cpu",
            ACCELERATE_USE_FSDP="true",
            FSDP_VERSION="2",
            FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
            FSDP_CPU_RAM_EFFICIENT_LOADING="false",
        )
        return folder, dict(zip(parts, printed, strict=True))

    return once(tmp_path_factory, "sharded", run)


@pytest.mark.parametrize("method", SHARDED)
def test_sharded_parameters_continue_what_one_process_began(sharded, method):
    """FSDP2 reads a checkpoint of a single process, trains as one, and writes a checkpoint like its."""
    folder, printed = sharded
    assert "2 processes (FSDP2)" in printed[method] and "continuing at step 5" in printed[method]
    assert f"sharded: {SHARDED[method]}" in printed[method]
    assert_same_training(folder / "one" / method, folder / "two" / method)


def test_sharding_on_the_cpu_is_refused_not_ignored(tiny, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP.*'cpu'"):
        pretrain(tiny())
