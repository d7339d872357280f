import json
import re
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.run import pretrain
from mimkernels.commands.probe.config import ProbeConfig, parse_poolings
from mimkernels.commands.probe.run import ProbeRun, probe
from mimkernels.commands.probe.train import Probe, ProbeTrainer, build_optimizer, knn_accuracy
from mimkernels.data.split import open_split
from mimkernels.engine.command import TrainingError
from mimkernels.engine.encoder import load_encoder
from mimkernels.engine.progress import Progress
from mimkernels.models import MAE
from mimkernels.nn import build_pooling
from mimkernels.nn.encoder import resample_positions


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_settings):
    """A run folder with a tiny MAE of digits."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    pretrain(PretrainConfig(**{**tiny_settings, "output": str(folder), "pictures": 0}))
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with 12 pictures of every digit."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("data") / "digits"
    images, targets = load_digits(return_X_y=True)
    for digit in range(10):
        (folder / str(digit)).mkdir(parents=True)
        for number, levels in enumerate(images[targets == digit][:12]):
            Image.fromarray((15 * levels.reshape(8, 8)).astype(np.uint8)).save(folder / str(digit) / f"{number}.png")
    return folder


@pytest.fixture
def config(trained, digits, tmp_path):
    """Ten classes, 100 images to train on in 5 steps per epoch, 20 to test on."""

    def make(**changes) -> ProbeConfig:
        values = {"model": str(trained), "data": str(digits), "output": str(tmp_path / "probe")}
        values |= {"epochs": 3, "batch_size": 20}
        values |= {"pooling": "cls,abmilp", "device": "cpu", "precision": "fp32", "workers": 0, "pictures": 0}
        return ProbeConfig(**{**values, **changes})

    return make


@pytest.fixture
def flags(tmp_path):
    """Class folders of one-coloured pictures, easy to tell apart; returns the folder."""

    def make(name="flags", classes=("blue", "green", "red"), count=10):
        colours = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}
        for kind in classes:
            (tmp_path / name / kind).mkdir(parents=True)
            for number in range(count):
                noise = np.random.default_rng(number).integers(0, 50, (16, 16, 3))
                picture = (noise + np.array(colours[kind])).astype(np.uint8)
                Image.fromarray(picture).save(tmp_path / name / kind / f"{number}.png")
        return tmp_path / name

    return make


TIMM = {
    "model": "vit_tiny_patch16_224", "pretrained": False, "img_size": 32,
    "model_kwargs": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
}  # fmt: skip


def test_every_pooling_is_trained_and_reported(config, capsys):
    names = "cls,mean,max,gem,cls+mean,abmilp,abmilp:depth=2:positions=true,attn-mn,attn-lcte,topk:k=0.5,"
    names += "ep:num_queries=4,map:num_heads=2,aim:num_heads=2,cae:num_heads=2,simpool"
    result = probe(config(pooling=names, epochs=4, pictures=3, logistic=True))
    assert [one.label for one in result.results] == names.split(",")
    told = capsys.readouterr().out
    for one in result.results:
        assert len(one.losses) == 4 and one.losses[3] < one.losses[0], one
        assert one.label in told and one.seconds > 0
        assert (one.knn is None) == (one.logistic is None) == (one.pooling_parameters > 0)
    assert "0 + 170" in told and "16 + 170" in told  # [cls] and AbMILP of 16 columns; 10 classes
    page = result.report.read_text()
    assert "abmilp:depth=2" in page and "one by one" in page
    assert not re.search(r'(src|href)=(?!"?(data:|#))', page)  # nothing outside the file


def test_probing_learns(config, tmp_path):
    settings = {"data": "digits", "pooling": "mean,cls", "batch_size": 300}
    first, last = (probe(config(**settings, epochs=n, output=str(tmp_path / str(n)))) for n in (1, 40))
    assert (first.test_images, last.results[0].logistic) == (297, None)
    for before, after in zip(first.results, last.results, strict=True):
        assert after.accuracy > before.accuracy + 0.2 and after.knn > 0.3


def test_the_classifier_is_batch_norm_and_a_linear_layer():
    torch.manual_seed(0)
    made = Probe(build_pooling("mean", 8, 1), classes=3)
    assert (made.norm.affine, made.norm.eps, made.linear.out_features) == (False, 1e-6, 3)
    assert [name for name, _ in made.named_parameters()] == ["linear.weight", "linear.bias"]


def test_lars_adapts_matrices_and_leaves_vectors():
    module = nn.Linear(4, 3)
    nn.init.constant_(module.bias, 0.5)
    before = [weight.detach().clone() for weight in module.parameters()]
    gradients = [torch.randn_like(weight) for weight in module.parameters()]
    optimizer = build_optimizer(ProbeConfig(model="m", lr=2.0), module, steps=10**6)
    for weight, gradient in zip(module.parameters(), gradients, strict=True):
        weight.grad = gradient
    optimizer.step()
    rate = 0.001 * before[0].norm() / gradients[0].norm()
    torch.testing.assert_close(module.weight.detach(), before[0] - 2.0 * rate * gradients[0])
    torch.testing.assert_close(module.bias.detach(), before[1] - 2.0 * gradients[1])


def test_the_recipe_is_the_published_one_and_goes_further_where_steps_are_few():
    imagenet = ProbeConfig(model="m", batch_size=16384)
    assert (imagenet.peak_lr, imagenet.trust_coefficient(7020)) == (pytest.approx(6.4), 0.001)
    assert ProbeConfig(model="m", batch_size=256).trust_coefficient(90 * 5004) == 0.001
    small = ProbeConfig(model="m", batch_size=256)
    assert small.peak_lr * small.trust_coefficient(675) == pytest.approx(0.002)
    assert small.peak_lr * small.trust_coefficient(5) == pytest.approx(0.01)
    given = ProbeConfig(model="m", lr=0.3, trust=0.002)
    assert (given.peak_lr, given.trust_coefficient(5)) == (0.3, 0.002)


def test_k_nearest_neighbours_vote_by_closeness():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [0.2, 0.8]])
    targets = torch.tensor([0, 0, 1, 1, 1])
    # Three of class 1 among all five, but far away: two close ones outvote them.
    assert knn_accuracy(train, targets, torch.tensor([[5.0, 0.1]]), torch.tensor([0]), 5, 2) == 1.0
    assert knn_accuracy(train, targets, torch.tensor([[0.1, 5.0]]), torch.tensor([0]), 5, 2) == 0.0


def test_poolings_are_trained_the_same_in_any_company(config, tmp_path):
    both = probe(config(output=str(tmp_path / "both"), pooling="mean,abmilp"))
    alone = probe(config(output=str(tmp_path / "alone"), pooling="abmilp"))
    assert both.results[1].losses == alone.results[0].losses
    assert both.results[1].accuracy == alone.results[0].accuracy


def test_tokens_in_memory_or_encoded_again_make_no_difference(config, tmp_path):
    kept = probe(config(output=str(tmp_path / "kept")))
    again = probe(config(output=str(tmp_path / "again"), cache_gib=0))
    for one, other in zip(kept.results, again.results, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-4)
        assert one.accuracy == pytest.approx(other.accuracy, abs=0.01)


def test_augmented_images_are_other_images(config, tmp_path):
    plain = probe(config(output=str(tmp_path / "plain"), epochs=1))
    augmented = probe(config(output=str(tmp_path / "augmented"), epochs=1, augment=True, pooling="cls,attn-mn,abmilp"))
    assert augmented.results[0].losses != plain.results[0].losses
    assert all(np.isfinite(one.losses).all() for one in augmented.results)


def stop_at(step: int, monkeypatch) -> None:
    """Press Ctrl-C while step number ``step``, counted from 0, is running."""
    train_step, pressed = ProbeTrainer._train_step, []

    def pressing(self, *arguments):
        if self.step == step and not pressed:
            pressed.append(signal.raise_signal(signal.SIGINT))
        return train_step(self, *arguments)

    monkeypatch.setattr(ProbeTrainer, "_train_step", pressing)


def test_an_interrupted_probe_goes_on_with_the_same_numbers(config, tmp_path, monkeypatch, capsys):
    whole = probe(config(output=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        stop_at(6, patch)
        first = probe(config())
    assert (first.stopped_by, first.results, first.report) == (signal.SIGINT, [], None)
    second = probe(config())
    assert "continuing at step 7" in capsys.readouterr().out
    for one, other in zip(whole.results, second.results, strict=True):
        assert (one.losses, one.accuracy, one.knn) == (other.losses, other.accuracy, other.knn)
    assert not (tmp_path / "probe" / "unfinished.pt").exists()


def test_finished_poolings_are_kept_and_new_ones_added(config, monkeypatch, capsys):
    first = probe(config(pooling="cls,abmilp", pictures=2))
    seen = []
    step = ProbeTrainer._train_step
    monkeypatch.setattr(ProbeTrainer, "_train_step", lambda self, t, *a: seen.append(t.label) or step(self, t, *a))
    second = probe(config(pooling="mean,abmilp,cls", pictures=2))
    assert set(seen) == {"mean"} and "kept from" in capsys.readouterr().out
    assert [one.label for one in second.results] == ["mean", "abmilp", "cls"]
    assert second.results[2] == first.results[0]
    with pytest.raises(ValueError, match=r"holds another probe \(different: epochs \d+ -> 4\).*--overwrite"):
        probe(config(epochs=4))
    assert len(probe(config(epochs=1), overwrite=True).results) == 2


def test_another_encoder_is_another_probe(config, trained, tmp_path):
    probe(config(pooling="mean", epochs=1))
    content = torch.load(trained / "mae_checkpoint.pth", weights_only=True)
    content["model"]["cls_token"] += 1
    torch.save(content, tmp_path / "other.pth")
    (tmp_path / "config.json").write_text((trained / "config.json").read_text())
    with pytest.raises(ValueError, match=r"different: encoder\)"):
        probe(config(pooling="mean", epochs=1, model=str(tmp_path / "other.pth")))


def test_random_weights_are_the_same_ones_every_time(config, flags):
    """Whatever was drawn before: the same command goes on with what is finished, and adds poolings to it."""
    settings = {**TIMM, "data": str(flags()), "batch_size": 8, "epochs": 1}
    (first,) = probe(config(**settings, pooling="mean")).results
    torch.randn(3)
    both = probe(config(**settings, pooling="mean,cls")).results
    assert [result.label for result in both] == ["mean", "cls"] and both[0].accuracy == first.accuracy


def test_run_folder_checkpoint_and_export_are_the_same_encoder(config, trained):
    images = torch.randint(256, (2, 1, 16, 16), dtype=torch.uint8)
    places = [trained, trained / "checkpoints" / "final.pt", trained / "mae_checkpoint.pth"]
    first, *others = (load_encoder(config(model=str(place)))(images).tokens for place in places)
    for tokens in others:
        torch.testing.assert_close(tokens, first, rtol=0, atol=0)
    # And it is the encoder that was trained: all patches visible, in order.
    model = MAE.from_config(torch.load(places[1], weights_only=True)["model_config"])
    model.load_state_dict(torch.load(places[1], weights_only=True)["model"])
    ids = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(first, model.eval().encode(images, ids).detach())


def test_published_checkpoints_load_by_the_shapes_of_their_weights(config, tmp_path):
    model = MAE.from_timm(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, decoder_dim=16, decoder_depth=1, decoder_heads=2
    )
    torch.save({"model": model.mae_state_dict()}, tmp_path / "mae.pth")
    encoder = load_encoder(config(model=str(tmp_path / "mae.pth")))
    assert (encoder.dim, encoder.num_tokens, encoder.num_prefix, encoder.grid) == (192, 5, 1, (2, 2))
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    wanted = model.eval().encode((images / 255 - mean) / std, torch.arange(4).expand(2, -1)).detach()
    torch.testing.assert_close(encoder(images).tokens, wanted, rtol=1e-4, atol=1e-5)
    raw = load_encoder(config(model=str(tmp_path / "mae.pth"), final_norm=False))(images).tokens
    torch.testing.assert_close(model.encoder.norm(raw), wanted, rtol=1e-4, atol=1e-5)


def test_a_timm_model_on_a_folder_of_classes(config, flags):
    result = probe(config(**TIMM, data=str(flags()), pooling="cls,attn-lcte,ep:num_queries=4", batch_size=8, epochs=20))
    assert result.test_images == 6
    assert max(one.accuracy for one in result.results) == 1.0


def test_the_encoder_stays_frozen(config):
    run = ProbeRun(config())
    before = run.encoder.fingerprint()
    run.encoder.train()  # as whoever trains a module around it would
    run.execute()
    assert run.encoder.fingerprint() == before
    assert not any(weight.requires_grad for weight in run.encoder.parameters())
    assert not any(part.training for part in run.encoder.modules())


def test_the_split_depends_on_names_alone(config, flags):
    folder = flags()
    split, again = open_split(config(data=str(folder))), open_split(config(data=str(folder), seed=5))
    assert split.classes == ["blue", "green", "red"]
    assert split.test.targets.bincount().tolist() == [2, 2, 2]
    assert sorted([*split.train.indices, *split.test.indices]) == list(range(30))
    held_out = [split.test.label(i) for i in range(6)]
    assert held_out == [again.test.label(i) for i in range(6)]
    assert all(split.classes[int(split.test.targets[i])] in held_out[i] for i in range(6))
    moved = folder.rename(folder.parent / "elsewhere")
    there = open_split(config(data=str(moved)))
    assert [there.test.label(i).replace(str(moved), str(folder)) for i in range(6)] == held_out


def test_train_and_val_folders_are_the_split(config, flags):
    folder = flags("data/train").parent
    flags("data/val", classes=("green", "red"), count=2)
    split = open_split(config(data=str(folder)))
    assert (len(split.train), split.test.targets.tolist()) == (30, [1, 1, 2, 2])  # by the training classes' numbers
    assert "val" in split.description


def test_a_test_folder_may_be_given(config, flags):
    split = open_split(config(data=str(flags()), val_data=str(flags("other", count=3))))
    assert (len(split.train), len(split.test)) == (30, 9)
    with pytest.raises(ValueError, match="has a class 'green' that .* has not; it has blue, red"):
        open_split(config(data=str(flags("two", classes=("blue", "red"))), val_data=str(flags("three"))))


def test_images_that_cannot_be_read_are_left_out(config, flags):
    folder = flags()
    (folder / "red" / "3.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"1 of 2\d images cannot be read, such as .*3.png"):
        result = probe(config(**TIMM, data=str(folder), pooling="cls,abmilp", batch_size=8, epochs=2))
    assert result.test_images + len(open_split(config(data=str(folder))).train) == 30
    told = re.compile(r"<dt>Left out</dt>\s*<dd>1 of 2\d images cannot be read, such as .*3.png")
    assert told.search(result.report.read_text())
    again = probe(config(**TIMM, data=str(folder), pooling="cls,abmilp", batch_size=8, epochs=2))
    assert told.search(again.report.read_text())  # kept with the results


def test_accuracies_are_of_the_test_images_that_can_be_read(config, flags):
    folder = flags()
    for path in sorted((folder / "red").iterdir())[::2]:
        path.write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="images cannot be read"):
        result = probe(config(**TIMM, data=str(folder), pooling="cls", batch_size=4, epochs=1))
    assert 0 < result.test_images < len(open_split(config(data=str(folder))).test)
    right = result.results[0].accuracy * result.test_images
    assert right == pytest.approx(round(right), abs=1e-9)
    assert f"Accuracy on {result.test_images} test images" in result.report.read_text()


def test_a_run_is_read_at_another_size(config):
    own, other = load_encoder(config()), load_encoder(config(img_size=32))
    assert (own.img_size, own.grid, other.img_size, other.grid) == (16, (4, 4), 32, (8, 8))
    positions = resample_positions(own.model.pos_embed, (8, 8), (4, 4), 1)
    torch.testing.assert_close(other.model.pos_embed, positions, rtol=0, atol=0)
    assert other.fingerprint() != own.fingerprint()
    assert load_encoder(config(img_size=16)).fingerprint() == own.fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "model is missing"),
        ({"model": "vit_tiny_patch16_2244"}, "neither a file.*close names: vit_tiny_patch16_224"),
        ({"model": "runs/nothing.pth"}, "'runs/nothing.pth' does not exist"),
        ({"model": "resnet10t", "pretrained": False}, r"gives \[1, 512, \d+, \d+\], not tokens"),
        ({"pooling": "cls,attn"}, "unknown pooling 'attn'; known: cls, mean"),
        ({"pooling": "abmilp:depth"}, "expected NAME:OPTION=VALUE, got 'depth'"),
        ({"pooling": "abmilp:layers=2"}, "has no option 'layers'; it has depth"),
        ({"pooling": "ep:num_queries=5"}, "num_queries must divide the 16 columns of the result, got 5"),
        ({"pooling": "topk:k=17"}, "k = 17, but there are 16 patches"),
        ({"data": "nowhere"}, "image folder 'nowhere' does not exist"),
        ({"batch_size": 101}, "the data holds 100 images"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"warmup_epochs": 4}, r"warmup_epochs must be in 0..3"),
        ({"model_kwargs": {"depth": 2}}, "model_kwargs cannot be given with a checkpoint of `mimkernels pretrain`"),
        ({"img_size": 30}, r"a multiple of the patches of MAE .*, 4 x 4 pixels, got 30"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"val_share": 1.0}, "val_share must be between 0 and 1"),
        ({"precision": "fp16"}, "needs a GPU"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(config, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        probe(config(**changes))
    assert not (tmp_path / "probe").exists()


def test_data_without_labels_is_refused(config, tmp_path, flags):
    folder = flags()
    Image.new("L", (8, 8)).save(folder / "stray.png")
    with pytest.raises(ValueError, match="images outside class folders, such as 'stray.png'"):
        probe(config(data=str(folder)))
    with pytest.raises(ValueError, match="has 1 class: at least 2 are needed"):
        probe(config(data=str(flags("one", classes=("red",)))))


def test_a_loss_that_is_not_finite_ends_the_probe(config, tmp_path):
    with pytest.raises(TrainingError, match="loss of pooling 'abmilp' became .* at step 10"):
        probe(config(pooling="abmilp", optimizer="sgd", lr=1e38, warmup_epochs=0.0))


def test_registers_without_a_cls_token_have_none_to_pool(config):
    kwargs = {**TIMM["model_kwargs"], "class_token": False, "reg_tokens": 2, "global_pool": "avg"}
    timm_model = {**TIMM, "model_kwargs": kwargs}
    assert len(probe(config(**timm_model, pooling="mean", epochs=1)).results) == 1
    for name in ("cls", "attn-mn"):
        with pytest.raises(ValueError, match=rf"pooling '{name}' needs a \[cls\] token"):
            probe(config(**timm_model, pooling=name, output=f"{config().output}-{name}"))


def test_pooling_names_carry_options():
    choices = parse_poolings("cls, abmilp:depth=2:activation=relu,topk:k=0.5,cls")
    assert [(choice.name, choice.options) for choice in choices] == [
        ("cls", {}), ("abmilp", {"depth": 2, "activation": "relu"}), ("topk", {"k": 0.5}),
    ]  # fmt: skip


def test_the_command(config, capsys):
    from mimkernels.cli import main

    given = config(epochs=1)
    words = ["probe", "--model", given.model, "--output", given.output, "--epochs", "1", "--data", given.data]
    words += ["--batch-size", "50", "--workers", "0", "--pictures", "0"]
    assert main([*words, "--pooling", "mean", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "accuracy" in told and f"{given.output}/report.html" in told
    saved = json.loads(open(f"{given.output}/results.json").read())
    assert saved["results"][0]["label"] == "mean"
    assert main(["probe", "--list"]) == 0
    assert "abmilp" in capsys.readouterr().out
    assert main(["probe", "--model", "nonsense"]) == 2
    assert capsys.readouterr().err.startswith("mimkernels: error: model 'nonsense'")


def test_progress_is_shown(config, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(Progress, "update", lambda self, step, **values: seen.append((step, values["loss"])))
    probe(config(epochs=4))
    assert [step for step, _ in seen] == [10, 20] and all(loss > 0 for _, loss in seen)
