import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from mimkernels.cli import main
from mimkernels.commands.pretrain.cli import add_parser
from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.presets import PRESETS
from mimkernels.engine.checkpoint import CheckpointFolder
from mimkernels.engine.training.cli import settings_of

SMALL = [
    "--img-size", "16", "--in-chans", "1", "--patch-size", "4", "--model-kwargs", "embed_dim=16",
    "depth=1", "num_heads=2", "--decoder-dim", "16", "--decoder-depth", "1", "--decoder-heads", "2",
    "--batch-size", "300", "--epochs", "1",
    "--warmup-epochs", "0", "--workers", "0", "--device", "cpu", "--precision", "fp32", "--pictures", "2",
]  # fmt: skip


def run(*words: str) -> int:
    return main(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "vit_tiny_patch16_2244"], "vit_tiny_patch16_224"),
        (["--model", "resnet18"], "'resnet18' is no Vision Transformer"),
        (["--model", "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k"], "is not a plain timm name"),
        (["--model-kwargs", "checkpoint_path=evil.pth"], "model argument 'checkpoint_path' is not allowed"),
        (["--data", "missing_folder"], "image folder 'missing_folder' does not exist"),
        (["--data", "torchvision:CIFAR01"], "did you mean"),
        (["--data", "torchvision:LSUN"], "unpickles an index from its folder"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--batch-size", "2000"], "the data holds 1500 images"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--mask-ratio", "1"], "mask_ratio must be between 0 and 1"),
        (["--mask-ratio", "0.99"], "mask_ratio"),
        (["--img-size", "30", "--patch-size", "4"], "img_size 30 is not divisible by patch_size 4"),
        (["--img-size", "100", "--patch-size", "16"], "not divisible"),
        (["--model-kwargs", "embedding=3"], "embedding"),
        (["--resume", "missing.pt"], "checkpoint 'missing.pt' does not exist"),
        (["--precision", "fp16"], "needs a GPU"),
        (["--step-epoch", "0.5"], "step_epoch has no effect with schedule 'cosine', got 0.5"),
        (["--schedule", "step", "--min-lr", "1e-5"], "min_lr has no effect with schedule 'step', got 1e-05"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert run("pretrain", *SMALL, "--output", "run", *words) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and told[0].startswith("mimkernels: error: ") and message in told[0]
    assert os.listdir(tmp_path) == []


def test_debug_shows_where_an_error_comes_from(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        run("pretrain", "--data", str(tmp_path / "nowhere"), "--output", str(tmp_path / "run"), "--debug")


def test_resume_takes_the_settings_of_the_run(tmp_path, capsys):
    output = str(tmp_path / "run")
    assert run("pretrain", *SMALL, "--output", output) == 0
    assert run("pretrain", "--output", output, "--resume") == 0
    assert "nothing is left to train" in capsys.readouterr().out
    assert run("pretrain", "--output", output, "--resume", "--epochs", "2") == 0
    assert "step 10/10" in capsys.readouterr().out
    for words, change in [
        (["--epochs", "1"], "epochs: 2 -> 1"),
        (["--masking", "unit"], "masking: 'random' -> 'unit'"),
    ]:
        assert run("pretrain", "--output", output, "--resume", *words) == 2
        assert f"nothing is left to train with what was changed (checkpoint -> asked for: {change})" in (
            capsys.readouterr().err
        )
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] == 2
    for words, message in [
        (["--decoder-dim", "32"], "decoder_dim: 16 -> 32"),
        (["--method", "simmim"], "the checkpoint is of method 'mae', 'simmim' was asked for"),
        (["--overwrite"], f"--resume auto continues a run and --overwrite replaces the one in {output!r}"),
        (["--pixel-stats", "data"], "pixel_stats 'data' cannot be measured for a run that goes on"),
    ]:
        assert run("pretrain", "--output", output, "--resume", *words) == 2
        assert message in capsys.readouterr().err


def test_a_checkpoint_that_was_copied_out_of_its_run_goes_on_in_the_output(tmp_path, monkeypatch):
    assert run("pretrain", *SMALL, "--output", str(tmp_path / "run")) == 0
    (tmp_path / "kept" / "deep").mkdir(parents=True)
    copied = shutil.copy(tmp_path / "run" / "checkpoints" / "final.pt", tmp_path / "kept" / "deep")
    monkeypatch.chdir(tmp_path)
    assert run("pretrain", "--resume", copied, "--epochs", "2") == 0  # went on in the folder above the file's
    assert os.listdir(tmp_path / "kept") == ["deep"] and (tmp_path / "runs" / "pretrain" / "report.html").is_file()
    assert run("pretrain", "--resume", copied, "--epochs", "2", "--output", "named") == 0
    assert (tmp_path / "named" / "checkpoints" / "final.pt").is_file()
    monkeypatch.chdir(tmp_path / "named" / "checkpoints")
    assert run("pretrain", "--resume", "final.pt", "--epochs", "3") == 0  # of the run in whose folder that is
    assert json.loads((tmp_path / "named" / "config.json").read_text())["epochs"] == 3


def test_a_schedule_may_be_given_over_that_of_a_preset():
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    for preset, schedule in (("simmim-vit-b-800", "cosine"), ("simmim-swin-b-100", "step")):
        args = parser.parse_args(["pretrain", "--preset", preset, "--schedule", schedule])
        assert settings_of(args, PretrainConfig, PRESETS).schedule == schedule


def test_ctrl_c_saves_and_exits_with_its_code(tmp_path):
    options = ["--output", str(tmp_path / "run"), "--epochs", "9999"]
    command = [sys.executable, "-m", "mimkernels", "pretrain", *SMALL, *options]
    command[command.index("--workers") + 1] = "1"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: workers get it too
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    saved = CheckpointFolder(tmp_path / "run" / "checkpoints", 2).steps()
    assert len(saved) == 1 and f"stopped at step {saved[0]}" in out
