import os

import pytest
import torch

from mimkernels.commands.pretrain.config import PretrainConfig

TINY = {
    "img_size": 16,
    "in_chans": 1,
    "patch_size": 4,
    "model_kwargs": {"embed_dim": 16, "depth": 1, "num_heads": 2},
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "batch_size": 300,  # 5 steps per epoch of the 1500 digits
    "epochs": 1,
    "warmup_epochs": 0.2,
    "lr": 1e-3,
    "crop_scale": 1.0,  # random crops, half of the time of such a step, where a test asks for them
    "log_every": 1,
    "workers": 0,
    "pictures": 3,
    "device": "cpu",
    "precision": "fp32",
}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Models this small only lose by a second thread; runs in subprocesses inherit the setting."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    yield
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


@pytest.fixture(scope="session")
def tiny_settings():
    """Of a model that trains in seconds."""
    return dict(TINY)


@pytest.fixture
def tiny(tmp_path):
    """Configurations of a model that trains in seconds; the run folder is new."""

    def make(**changes) -> PretrainConfig:
        return PretrainConfig(**{**TINY, "output": str(tmp_path / "run"), **changes})

    return make
