"""Two processes on one machine, started as a user would; gloo on the CPU."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mimkernels.commands.pretrain.run import pretrain
from mimkernels.engine.checkpoint import load
from mimkernels.engine.training.history import read_entries

_SIMMIM = {"method": "simmim", "mask_unit": 4, "decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}
METHODS = {
    "mae": {},
    "simmim-beit": {**_SIMMIM, "model": "beit_base_patch16_224"},
    "simmim-swinv2": {
        **_SIMMIM, "model": "swinv2_tiny_window8_256", "patch_size": 2,
        "model_kwargs": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    },
}  # fmt: skip
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


def launch(words: list[str], *, expect: int = 0, program=("-m", "mimkernels", "pretrain"), **environment: str) -> str:
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *program, *words],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(folder, name="loss") -> list[float]:
    return [entry[name] for entry in read_entries(folder / "metrics.jsonl") if name in entry]


def assert_same_training(one, two):
    assert losses(two) == pytest.approx(losses(one), rel=2e-5)
    assert losses(two, "val_loss") == pytest.approx(losses(one, "val_loss"), rel=2e-5)
    assert len(losses(one, "val_loss")) == SETTINGS["epochs"]
    a, b = (load(folder / "checkpoints" / "final.pt") for folder in (one, two))
    for name, value in a["model"].items():
        torch.testing.assert_close(b["model"][name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("method", ["mae", "simmim-swinv2"])
def test_two_processes_train_as_one_and_resume(tiny, tmp_path, method):
    settings = {**SETTINGS, **METHODS[method]}
    pretrain(tiny(**settings, accum_steps=2, output=str(tmp_path / "one")))
    config = tiny(**settings, output=str(tmp_path / "two"))
    out = launch(options(config))
    assert len(re.findall(r"saved .*step-00000005\.pt", out)) == 1 and len(re.findall(r"saved .*final\.pt", out)) == 1
    assert len(re.findall(r"^Device .*2 processes", out, re.M)) == 1
    assert_same_training(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "report.html").exists()
    if method != "mae":  # two processes that continue a run of SimMIM: below, sharded
        return

    # Again from the end of the first epoch.
    (tmp_path / "two" / "checkpoints" / "final.pt").unlink()
    out = launch(["--output", str(tmp_path / "two"), "--resume"])
    assert "continuing at step 5" in out
    assert_same_training(tmp_path / "one", tmp_path / "two")


_TEACHER = "features:vit_tiny_patch16_224:pretrained=false,patch_size=8,embed_dim=16,depth=1,num_heads=2"


@pytest.mark.parametrize("target", [_TEACHER, "ema:layers=1", "0.5*pixels + bootstrap"])
def test_two_processes_learn_from_one_teacher(tiny, tmp_path, target):
    settings = {
        **SETTINGS, **_SIMMIM, "target": target, "masking": "block", "mask_ratio": 0.4, "pictures": 0, "val_images": 16,
        "momentum": 0.5 if target.startswith("ema") else None,
    }  # fmt: skip
    pretrain(tiny(**settings, accum_steps=2, output=str(tmp_path / "one")))
    out = launch(options(tiny(**settings, output=str(tmp_path / "two"))))
    assert len(re.findall(r"^Target .*features of", out, re.M)) == 1
    assert_same_training(tmp_path / "one", tmp_path / "two")
    a, b = (load(tmp_path / name / "checkpoints" / "final.pt") for name in ("one", "two"))
    assert a.get("teachers") == b.get("teachers") and ("target_teacher" in a) == (target != _TEACHER)
    for name, value in a.get("target_teacher", {}).items():
        torch.testing.assert_close(b["target_teacher"][name], value, rtol=1e-3, atol=2e-5)


def test_bad_input_ends_every_process(tiny, tmp_path):
    config = tiny(data=str(tmp_path / "nowhere"))
    out = launch(options(config), expect=1)
    assert "mimkernels: error: image folder" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", SHARDED)
def test_sharded_parameters_continue_what_one_process_began(tiny, tmp_path, method):
    """FSDP2 reads a checkpoint of a single process, trains as one, and writes a checkpoint like its."""
    for name in ("one", "two"):
        pretrain(tiny(**{**SETTINGS, **METHODS[method]}, accum_steps=2, output=str(tmp_path / name)))
    (tmp_path / "two" / "checkpoints" / "final.pt").unlink()
    out = launch(
        ["--output", str(tmp_path / "two"), "--resume", "--accum-steps", "1"],
        program=[str(Path(__file__).with_name("sharded_on_cpu.py"))],
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_CPU_RAM_EFFICIENT_LOADING="false",
    )
    assert "2 processes (FSDP2)" in out and "continuing at step 5" in out
    assert f"sharded: {SHARDED[method]}" in out
    assert_same_training(tmp_path / "one", tmp_path / "two")


def test_sharding_on_the_cpu_is_refused_not_ignored(tiny, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP.*'cpu'"):
        pretrain(tiny())
