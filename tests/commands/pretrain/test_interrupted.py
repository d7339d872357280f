"""What a killed writer, a full disk or a changed bit leaves behind, and how a run goes on from there."""

import errno
import json
import os
import shutil
import signal

import pytest
import torch

from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.run import pretrain
from mimkernels.engine import files
from mimkernels.engine.checkpoint import CheckpointFolder, load
from mimkernels.engine.command import TrainingError
from mimkernels.engine.files import atomic_file, save
from mimkernels.engine.progress import Progress
from mimkernels.engine.training.history import History, read_entries
from mimkernels.engine.training.resume import settings_to_continue

SETTINGS = {"epochs": 2, "save_every": 0.2, "keep_checkpoints": 3, "pictures": 0,
            "head_stats": "entropy", "head_stats_every": 2}  # fmt: skip


@pytest.fixture(scope="module")
def run_stopped_at_step_7(tiny_settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "run"
    update = Progress.update

    def pressed(self, done, **values):
        update(self, done, **values)
        if done == 6:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "update", pressed)
        assert pretrain(PretrainConfig(**{**tiny_settings, **SETTINGS, "output": str(folder)})).step == 7
    return folder


@pytest.fixture
def stopped(tiny, tmp_path, run_stopped_at_step_7):
    """A run of 10 steps that was stopped after step 7; its folder holds steps 5, 6 and 7 and recorded heads."""
    shutil.copytree(run_stopped_at_step_7, tmp_path / "run")
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints", 3)
    assert folder.steps() == [5, 6, 7]
    return tiny(**SETTINGS), folder


@pytest.fixture(scope="module")
def whole(tiny_settings, tmp_path_factory):
    """The weights that an undisturbed run ends with."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    pretrain(PretrainConfig(**{**tiny_settings, "epochs": 2, "pictures": 0, "output": str(folder)}))
    return load(folder / "checkpoints" / "final.pt")["model"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-500])


def flip(path):
    """Change one bit of a weight."""
    content = bytearray(path.read_bytes())
    weight = next(iter(torch.load(path, weights_only=True)["model"].values())).numpy().tobytes()
    content[content.index(weight) + 5] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def assert_ends_like(folder, whole):
    final = load(folder.final)["model"]
    assert final.keys() == whole.keys() and all(torch.equal(final[name], whole[name]) for name in whole)


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_checkpoint_is_refused_and_names_the_whole_one_before_it(stopped, damage):
    config, folder = stopped
    damage(folder.path(7))
    with pytest.raises(ValueError, match=r"step-00000007\.pt' cannot be read: .*step-00000006\.pt' beside it is whole"):
        pretrain(config, resume=str(folder.path(7)))
    cut(folder.path(6))
    with pytest.raises(ValueError, match=r"step-00000005\.pt' beside it is whole"):
        load(folder.path(7))


@pytest.mark.parametrize(
    ("damage", "resume"), [(cut, "auto"), (flip, "auto"), (empty, "auto"), (cut, "folder"), (flip, "file")]
)
def test_a_run_goes_on_from_the_newest_whole_checkpoint(stopped, whole, capsys, damage, resume):
    config, folder = stopped
    damage(folder.path(7))
    capsys.readouterr()
    where = {"auto": "auto", "folder": config.output, "file": str(folder.path(6))}[resume]
    result = pretrain(config, resume=where)
    told = capsys.readouterr().out
    warning = next(line for line in told.splitlines() if line.startswith("warning: "))
    assert "step-00000007.pt' cannot be read" in warning and "it is " in warning
    assert "continuing at step 6" in told and "step-00000006.pt, which is whole" in told
    assert result.step == 10
    assert_ends_like(folder, whole)
    assert [entry["step"] for entry in read_entries(folder.folder.parent / "metrics.jsonl")] == list(range(1, 11))
    # Out of the way of the ones that are kept, and of the next `--resume`.
    assert "step-00000007.pt.damaged" in os.listdir(folder.folder)
    assert folder.steps() == [7, 8, 9]


def test_settings_come_from_the_newest_whole_checkpoint(stopped):
    config, folder = stopped
    cut(folder.path(7))
    assert settings_to_continue("auto", config.output, PretrainConfig)["head_stats_every"] == 2


def test_a_damaged_final_checkpoint_is_trained_again(tiny, whole, tmp_path):
    config = tiny(epochs=2, save_every=1.0, pictures=0)
    pretrain(config)
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints", 2)
    flip(folder.final)
    assert pretrain(config, resume="auto").step == 10
    assert_ends_like(folder, whole)


def test_no_whole_checkpoint_is_not_a_new_start(stopped):
    config, folder = stopped
    for path in folder.newest_first():
        cut(path)
    with pytest.raises(ValueError, match=r"has no whole checkpoint: .*step-00000005.*--overwrite starts anew"):
        pretrain(config, resume="auto")
    assert folder.steps() == [5, 6, 7]


def test_what_killed_writers_left_is_swept_and_nothing_else(stopped):
    config, folder = stopped
    run = folder.folder.parent
    left = [folder.folder / ".step-00000008.pt.a1b2c3d4.tmp", run / ".metrics.jsonl.zzzzzz_9.tmp"]
    kept = [run / ".mine.tmp", run / "notes.tmp", folder.folder / "step-00000006.pt.copy"]
    for path in [*left, *kept]:
        path.write_bytes(b"content")
    with pytest.raises(ValueError, match="already holds a run"):
        pretrain(config)
    assert all(path.exists() for path in left)  # a refused run touches nothing
    pretrain(config, resume="auto")
    assert [path.exists() for path in [*left, *kept]] == [False] * 2 + [True] * 3


class Refusing:
    """A file on a disk that is full after 3000 bytes."""

    def __init__(self, file):
        self.file, self.taken = file, 0

    def write(self, part):
        self.taken += len(part)
        if self.taken > 3000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(part)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(tiny, tmp_path, monkeypatch, whole):
    config = tiny(epochs=2, save_every=0.4, pictures=0)
    fdopen, opened = os.fdopen, []

    def open_third_as_full(handle, mode):
        file = fdopen(handle, mode)
        opened.append(".step-" in os.readlink(f"/proc/self/fd/{handle}"))
        return Refusing(file) if opened[-1] and sum(opened) == 3 else file

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fdopen", open_third_as_full)
        with pytest.raises(TrainingError) as caught:
            pretrain(config)
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints", 2)
    text = str(caught.value)
    assert "\n" not in text and "No space left on device: " in text and str(folder.path(6)) in text
    assert f"--output {config.output} --resume goes on from {folder.path(4)}" in text
    assert sorted(os.listdir(folder.folder)) == ["step-00000002.pt", "step-00000004.pt"]
    assert not (tmp_path / "run" / ".lock").exists()
    pretrain(config, resume="auto")
    assert_ends_like(folder, whole)


def test_a_full_disk_under_the_metrics_is_one_line(tiny, monkeypatch):
    def refuse(self, step, values):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(History, "add", refuse)
    with pytest.raises(TrainingError, match="^No space left on device: 'metrics.jsonl'; nothing had been saved yet"):
        pretrain(tiny())


def test_the_error_of_the_disk_is_told_not_what_torch_makes_of_it(tmp_path):
    def writer(value, file):
        torch.save(value, Refusing(file))

    with pytest.raises(OSError) as caught:
        save(tmp_path / "file.pt", {"w": torch.zeros(5000)}, writer)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "file.pt"))
    with pytest.raises(KeyError), atomic_file(tmp_path / "other"):
        raise KeyError("of the caller")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "heads.jsonl"])
def test_strange_lines_do_not_block_the_way_on(stopped, whole, name):
    config, folder = stopped
    path = folder.folder.parent / name
    strange = ["{}", '{"loss": 1}', '{"step": "3"}', "[1, 2]", "3", '{"step": 2, "loss": "low", "heads": {}}', "\0\xff"]
    lines = path.read_text().splitlines()
    path.write_bytes("\n".join([*lines[:2], *strange, *lines[2:], lines[-1][:20]]).encode("latin-1"))
    with pytest.warns(UserWarning, match=rf"{name}': line 3 and 6 more are no entries of a run, left out"):
        pretrain(config, resume="auto")
    assert_ends_like(folder, whole)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == (list(range(1, 11)) if name == "metrics.jsonl" else [1, 2, 4, 6, 8, 10])


def test_lost_metrics_do_not_block_the_report(stopped):
    config, folder = stopped
    pretrain(config, resume="auto")
    (folder.folder.parent / "metrics.jsonl").unlink()
    report = pretrain(config, resume="auto").report
    assert "What was run" in report.read_text()


def crafted(folder, change):
    path = folder.path(7)
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def weight(content):
    return next(name for name in content["model"] if name.endswith("qkv.weight"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model={}), "'model' must be named tensors"),
        (lambda c: c.update(model={"w": 3}), "'model' must be named tensors"),
        (lambda c: c.update(step="3"), "'step' must be a whole number, 0 or more, got str '3'"),
        (lambda c: c.update(step=-1), "'step' must be a whole number, 0 or more, got int '-1'"),
        (lambda c: c.update(step=True), "'step' must be a whole number"),
        (lambda c: c.update(epoch=None), "'epoch' must be a number"),
        (lambda c: c.update(seconds=float("nan")), "'seconds' must be a number"),
        (lambda c: c.pop("seconds"), "'seconds' must be a number, 0 or more, got nothing"),
        (lambda c: c.update(optimizer=[]), "'optimizer' must be a dict"),
        (lambda c: c.update(optimizer={}), "the optimizer's groups are not those of the trained weights"),
        (lambda c: c.update(scaler=1), "'scaler' must be a dict or None"),
        (lambda c: c.update(config=3), "'config' must be a dict"),
        (lambda c: c.update(data=1), "'data' must be a string"),
        (lambda c: c.update(effective_batch="300"), "'effective_batch' must be a whole number"),
        (lambda c: c["config"].update(batch_size="300"), "config: setting 'batch_size' must be int, got str '300'"),
        (lambda c: c["config"].update(model_kwargs=[]), "config: setting 'model_kwargs' must be dict, got list"),
        (lambda c: c["config"].update(surprise=1), "config: unknown setting 'surprise'"),
        (lambda c: c["model"].update({weight(c): torch.zeros(2, 2)}), r"shapes differ \(1\): .*checkpoint \[2, 2\]"),
        (lambda c: c["model"].pop(weight(c)), r"in the model but not in the checkpoint \(1\)"),
        (lambda c: c["model"].update(more=torch.zeros(1)), r"in the checkpoint but not in the model \(1\): more"),
        (lambda c: c["optimizer"]["state"].pop(weight(c)), r"the optimizer holds nothing of '.*qkv\.weight'"),
        (
            lambda c: c["optimizer"]["state"][weight(c)].update(exp_avg=torch.zeros(3)),
            r"the optimizer's exp_avg of '.*qkv\.weight' is torch\.float32 \[3\], expected .* \[48, 16\]",
        ),
        (
            lambda c: c["optimizer"]["state"][weight(c)].update(exp_avg=torch.zeros(1).expand(48, 16)),
            r"the optimizer's exp_avg of '.*qkv\.weight' is torch\.float32 \[48, 16\], expected dense",
        ),
        (
            lambda c: c["optimizer"]["state"][weight(c)].update(step=torch.tensor(1, dtype=torch.int64)),
            r"the optimizer's step of '.*qkv\.weight' is torch\.int64 \[\], expected dense torch\.float32 \[\]",
        ),
        (lambda c: c["optimizer"]["state"][weight(c)].update(step="x"), "the optimizer's step of .* is str"),
    ],
)  # fmt: skip
def test_a_checkpoint_is_held_against_one_schema(stopped, change, message):
    config, folder = stopped
    crafted(folder, change)
    with pytest.raises(ValueError, match=rf"(?s)step-00000007\.pt.*{message}"):
        pretrain(config, resume="auto")
    assert folder.steps() == [5, 6, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_kwargs": {"checkpoint_path": "evil.pth"}}, "model argument 'checkpoint_path' is not allowed"),
        ({"model_kwargs": {"pretrained_cfg": {"file": "evil.pth"}, "pretrained": True}}, "model argument 'pretrained"),
        ({"model_kwargs": {"name": "local-dir:evil"}}, "model_kwargs repeats name"),
        ({"model": "local-dir:evil"}, "model 'local-dir:evil' is not a plain timm name"),
        ({"model": "hf-hub:someone/model"}, "model 'hf-hub:someone/model' is not a plain timm name"),
    ],
)
def test_a_checkpoint_cannot_make_timm_open_anything(stopped, tmp_path, monkeypatch, capsys, change, message):
    from mimkernels.cli import main

    config, folder = stopped
    (tmp_path / "evil").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("timm.create_model", lambda *a, **k: pytest.fail("timm was asked"))
    crafted(folder, lambda content: content["config"].update(change))
    for command in (["pretrain", "--output", config.output, "--resume"], ["pretrain", "--resume", str(folder.path(7))],
                    ["probe", "--model", config.output, "--output", "probe"]):  # fmt: skip
        assert main(command) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1
    # And the settings beside exported weights.
    run = folder.folder.parent
    torch.save({"model": load_model(folder)}, run / "mae_checkpoint.pth")
    (run / "config.json").write_text(json.dumps({**json.loads((run / "config.json").read_text()), **change}))
    assert main(["probe", "--model", str(run / "mae_checkpoint.pth"), "--output", "probe"]) == 2
    assert message in capsys.readouterr().err


def load_model(folder):
    return {
        name.removeprefix("encoder."): w for name, w in torch.load(folder.path(6), weights_only=True)["model"].items()
    }


def test_evil_checkpoints_get_no_advice_to_trust_them(tmp_path, capsys):
    from mimkernels.cli import main

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"format": 1, "step": 1, "optimizer": {}, "config": {}, "model": Evil()}, tmp_path / "evil.pth")
    for command in (["pretrain", "--resume"], ["probe", "--model"]):
        assert main([*command, str(tmp_path / "evil.pth"), "--output", str(tmp_path / "run")]) == 2
        told = capsys.readouterr().err
        assert "holds more than tensors and plain values" in told and "weights_only" not in told
    assert os.listdir(tmp_path) == ["evil.pth"]


def test_settings_that_cannot_be_read_name_their_file(tmp_path):
    for text, message in (("{", "config.json' does not hold settings"), ("[]", "expected an object, found list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            PretrainConfig.load(tmp_path / "config.json")


def test_a_changed_weight_decay_is_the_one_that_trains_on(stopped, monkeypatch):
    config, folder = stopped
    config.weight_decay = 0.5
    pretrain(config, resume="auto")
    groups = load(folder.final)["optimizer"]["param_groups"]
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.5]


def test_a_full_disk_under_tensorboard_is_told_once_and_without_traceback(tiny, monkeypatch, capfd):
    def refuse(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", refuse)
    config = tiny(epochs=4, pictures=0)
    with pytest.raises(TrainingError, match=f"^No space left on device: '{config.output}'"):
        pretrain(config)
    assert "Traceback" not in capfd.readouterr().err
