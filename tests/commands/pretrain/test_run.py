import json
import math
import signal
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from mimkernels.commands.pretrain.run import pretrain
from mimkernels.engine.checkpoint import load
from mimkernels.engine.command import TrainingError
from mimkernels.engine.progress import Progress
from mimkernels.engine.training.history import read_entries
from mimkernels.engine.training.loop import Trainer
from mimkernels.models import MAE


def losses(folder) -> list[float]:
    return [entry["loss"] for entry in read_entries(folder / "metrics.jsonl")]


def stop_after(step: int, monkeypatch) -> None:
    """Press Ctrl-C while step ``step`` is running."""
    update = Progress.update

    def pressed(self, done, **values):
        update(self, done, **values)
        if done == step - 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Progress, "update", pressed)


def assert_same_bits(a, b, where=""):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def test_a_run_interrupted_in_the_middle_of_an_epoch_continues_with_the_same_bits(tiny, tmp_path, monkeypatch):
    changes = {
        "epochs": 2,
        "crop_scale": 0.6,
        "workers": 2,
        "accum_steps": 2,
        "batch_size": 150,
        "model_kwargs": {"embed_dim": 16, "depth": 2, "num_heads": 2, "drop_path_rate": 0.2, "proj_drop_rate": 0.1},
    }
    pretrain(tiny(**changes, output=str(tmp_path / "whole")))
    config = tiny(**changes, output=str(tmp_path / "parts"))
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        first = pretrain(config)
    assert (first.step, first.stopped_by) == (3, signal.SIGINT)
    assert not (tmp_path / "parts" / "report.html").exists()
    config.workers = 1
    second = pretrain(config, resume="auto")
    assert (second.step, second.stopped_by) == (10, 0)

    whole, parts = (load(tmp_path / name / "checkpoints" / "final.pt") for name in ("whole", "parts"))
    for key in ("step", "model", "optimizer"):
        assert_same_bits(whole[key], parts[key], key)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert len(losses(tmp_path / "whole")) == 10


def test_a_stop_between_two_log_entries_leaves_none_of_its_own(tiny, tmp_path, monkeypatch):
    config = tiny(epochs=1, log_every=2)
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert pretrain(config).step == 3
    pretrain(config, resume="auto")
    assert [entry["step"] for entry in read_entries(tmp_path / "run" / "metrics.jsonl")] == [2, 4, 5]


def test_a_crash_after_the_checkpoint_loses_only_what_came_after_it(tiny, tmp_path, monkeypatch):
    config = tiny(epochs=2, save_every=0.4)
    whole = tiny(epochs=2, output=str(tmp_path / "whole"))
    pretrain(whole)
    step = Trainer._train_step

    def crash(self, batches):
        if self.step == 5:
            raise RuntimeError("power cut")
        step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            pretrain(config)
    assert len(losses(tmp_path / "run")) == 5
    pretrain(config, resume="auto")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert [entry["step"] for entry in read_entries(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 11))


def test_accumulated_gradients_are_those_of_all_their_images(tiny, tmp_path):
    """One step with 2 x 300 images moves the weights by the mean of the two gradients."""
    config = tiny(accum_steps=2, epochs=1)
    gradients = []

    class Seen(Trainer):
        def _log_due(self, step):
            if step == 1:
                gradients.extend(p.grad.clone() for p in self.model.parameters() if p.grad is not None)
            return super()._log_due(step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mimkernels.engine.training.run.Trainer", Seen)
        from mimkernels.commands.pretrain.run import Run

        run = Run(config)
        batches = list(run.plan.batches(0, 0, 1))
        model = MAE.from_config(run.model.config)
        model.load_state_dict(run.model.state_dict())
        run.execute()
    total = 0
    for accum, keys in enumerate(batches):
        images = torch.stack([run.images[key][0] for key in keys])
        total = total + model(images, seed=config.seed, offset=accum).loss / 2
    total.backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(expected) > 10
    for seen, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(seen, wanted)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    forward = MAE.forward

    def poisoned(self, images, *, offset=0, **options):
        out = forward(self, images, offset=offset, **options)
        return out._replace(loss=out.loss * (math.nan if offset == 3 else 1.0))

    monkeypatch.setattr(MAE, "forward", poisoned)
    config = tiny(save_every=0.4)
    with pytest.raises(TrainingError, match=r"loss became nan at step 4 .*learning rate .*step-00000002\.pt"):
        pretrain(config)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000002.pt"]
    assert len(losses(tmp_path / "run")) == 3
    assert not (tmp_path / "run" / "report.html").exists()


def test_weights_that_are_not_finite_are_not_saved(tiny, tmp_path, monkeypatch):
    step = Trainer._train_step

    def poison(self, batches):
        step(self, batches)
        with torch.no_grad():
            next(self.model.parameters()).fill_(math.inf)

    monkeypatch.setattr(Trainer, "_train_step", poison)
    with pytest.raises(TrainingError, match="no longer finite at step 1"):
        pretrain(tiny(save_every=0.2))
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


def test_a_run_folder_is_not_overwritten_unless_asked(tiny, tmp_path):
    config = tiny(pictures=0)
    pretrain(config)
    before = (tmp_path / "run" / "checkpoints" / "final.pt").read_bytes()
    with pytest.raises(ValueError, match=r"already holds a run .*--resume.*--overwrite"):
        pretrain(config)
    assert (tmp_path / "run" / "checkpoints" / "final.pt").read_bytes() == before
    config.seed = 1
    pretrain(config, overwrite=True)
    assert (tmp_path / "run" / "checkpoints" / "final.pt").read_bytes() != before
    assert len(losses(tmp_path / "run")) == 5

    other = tiny(decoder_dim=32)
    with pytest.raises(ValueError, match=r"another architecture or method .*decoder_dim: 16 -> 32"):
        pretrain(other, resume="auto")
    with pytest.raises(ValueError, match=r"effective batch .* is 300 in the checkpoint and 600 now"):
        pretrain(tiny(accum_steps=2), resume="auto")

    longer = tiny(seed=1, epochs=2)
    result = pretrain(longer, resume="auto")
    assert result.step == 10 and len(losses(tmp_path / "run")) == 10


def test_what_is_exported_rebuilds_the_model(tiny, tmp_path):
    pretrain(tiny())
    saved = load(tmp_path / "run" / "checkpoints" / "final.pt")
    model = MAE.from_config(saved["model_config"])
    model.load_checkpoint(tmp_path / "run" / "mae_checkpoint.pth")
    assert_same_bits(dict(saved["model"]), dict(model.state_dict()))
    published = torch.load(tmp_path / "run" / "mae_checkpoint.pth", weights_only=True)["model"]
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "mask_token"} <= set(
        published
    )
    assert any(name.startswith("decoder_blocks.0.") for name in published)


def test_broken_files_are_counted_and_warned_of_once(tiny, tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(8):
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:300])
    config = tiny(data=str(folder), batch_size=4, epochs=3, in_chans=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = pretrain(config)
    told = [str(w.message) for w in caught if "cannot read" in str(w.message)]
    assert len(told) == 1 and str(folder / "3.png") in told[0]
    assert result.broken_images == 1
    assert "1 image files could not be read" in result.report.read_text()


def test_tensorboard_holds_loss_rate_norm_and_speed(tiny, tmp_path):
    pretrain(tiny(pictures=0))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert {"train/loss", "train/lr", "train/images_per_second", "train/grad_norm"} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_the_report_stands_alone_and_tells_what_was_run(tiny, tmp_path):
    result = pretrain(tiny(title="A <title> & more"))
    page = result.report.read_text()
    assert "<svg" in page and page.count('<img src="data:image/png;base64,') == 3 * 3
    assert "A &lt;title&gt; &amp; more" in page
    for outside in ("<link", "<script", "@import", "url(http", 'src="http', "src=http"):
        assert outside not in page
    for word in (
        "original",
        "masked",
        "reconstruction",
        "optimizer",
        "images per second",
        "vit_tiny_patch16_224",
        "torch",
    ):
        assert word in page
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["title"] == "A <title> & more"


def test_warm_up_is_a_twentieth_of_any_number_of_epochs(tiny):
    from mimkernels.commands.pretrain.run import Run

    run = Run(tiny(warmup_epochs=None, epochs=8))
    trainer = Trainer(
        run.config, run.accelerator, run.model, None, run.images, run.plan, peak_lr=1.0, first_step=0, seconds=0.0,
        history=None, heads=run.heads, masking=run.masking, checkpoints=run.checkpoints, progress=run.progress,
        workers=0, about={},
    )  # fmt: skip
    assert (trainer.total_steps, trainer.warmup_steps) == (40, 2)
