import numpy as np
import pytest
import torch
from PIL import Image

from mimkernels.data.batches import (
    Augmentation,
    BatchPlan,
    PretrainImages,
    collate,
    make_loader,
    require_readable,
    to_mode,
)
from mimkernels.data.sources import DigitsSource, FolderSource, open_source


@pytest.fixture
def folder(tmp_path):
    """Six images in nested folders, and files that are none."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(["a/1.png", "a/2.JPG", "b/deep/3.jpeg", "4.bmp", "5.webp", "b/6.tif"]):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20 + number, 30, 3), dtype=np.uint8)).save(path)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / "._1.png").write_text("what macOS leaves behind")
    return tmp_path / "images"


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def dataset(source, seed=0, **options) -> PretrainImages:
    return PretrainImages(
        source, Augmentation(**{"img_size": 16, "in_chans": 3, "crop_scale": 0.2, "hflip": True} | options), seed
    )


def batches(images, workers, first_step=0, last_step=3, plan=None):
    plan = plan or BatchPlan(len(images), 2, 1, 1, seed=0)
    loader = make_loader(
        images, plan, rank=0, first_step=first_step, last_step=last_step, workers=workers, pin_memory=False
    )
    return list(loader)


def test_folders_are_read_with_and_without_class_folders_in_sorted_order(folder):
    source = open_source(str(folder))
    assert source.files == ["4.bmp", "5.webp", "a/1.png", "a/2.JPG", "b/6.tif", "b/deep/3.jpeg"]


def test_a_folder_that_is_missing_empty_or_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        FolderSource(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no images in .*looked for .*\.jpeg.*\.png"):
        FolderSource(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        FolderSource(tmp_path / "file")


def test_a_ring_of_links_ends(folder):
    (folder / "a" / "loop").symlink_to(folder)
    assert len(FolderSource(folder)) == 6


def test_an_unknown_torchvision_set_names_close_ones():
    with pytest.raises(ValueError, match="CIFAR10"):
        open_source("torchvision:CIFAR01")


def test_augmentation_is_a_function_of_seed_epoch_and_index(folder):
    images = dataset(FolderSource(folder))
    state = torch.get_rng_state()
    first = images[(0, 2)][0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(images[(0, 2)][0], first)
    assert first.dtype == torch.uint8 and first.shape == (3, 16, 16)
    assert not torch.equal(images[(1, 2)][0], first)
    assert not torch.equal(dataset(FolderSource(folder), seed=1)[(0, 2)][0], first)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_entered_in_the_middle_is_the_same_stream(workers):
    images = dataset(DigitsSource(), in_chans=1)
    plan = BatchPlan(len(images), 700, 1, 1, seed=3)
    whole = batches(images, 0, last_step=5, plan=plan)  # 2 steps per epoch
    rest = batches(images, workers, first_step=3, last_step=5, plan=plan)
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[3:], rest, strict=True))


def test_an_epoch_shows_every_image_once():
    plan = BatchPlan(60, 5, 2, 3, seed=0)
    seen = [key for rank in range(3) for batch in plan.batches(rank, 0, 4) for key in batch]
    assert plan.steps_per_epoch == 2
    assert sorted(key for key in seen if key[0] == 0) == [(0, i) for i in range(60)]
    assert sorted(key for key in seen if key[0] == 1) == [(1, i) for i in range(60)]


def test_processes_and_accumulation_take_the_same_pieces():
    two = BatchPlan(64, 4, 1, 2, seed=0)
    one = BatchPlan(64, 4, 2, 1, seed=0)
    parallel = [list(two.batches(rank, 0, 10)) for rank in range(2)]
    in_turn = list(one.batches(0, 0, 10))
    assert in_turn == [piece for step in zip(*parallel, strict=True) for piece in step]
    assert [two.piece(3, 0, rank) for rank in range(2)] == [one.piece(3, accum, 0) for accum in range(2)]


def test_more_images_per_step_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"holds 10 images.*24 = batch_size 4 x accum_steps 2 x 3"):
        BatchPlan(10, 4, 2, 3, seed=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_and_replaced_by_the_same_other_image(folder, workers):
    truncate(folder / "a" / "1.png")
    (folder / "5.webp").write_bytes(b"not an image")
    images = dataset(FolderSource(folder))
    first, second = batches(images, workers), batches(images, 0)
    assert all(batch.images.shape == (2, 3, 16, 16) for batch in first)
    assert all(torch.equal(a.images, b.images) and a.broken == b.broken for a, b in zip(first, second, strict=True))
    named = {images.source.label(index) for batch in first for index, _ in batch.broken}
    assert named == {str(folder / "a" / "1.png"), str(folder / "5.webp")}


def test_nothing_but_broken_images_is_an_error(folder):
    for name in FolderSource(folder).files:
        (folder / name).write_bytes(b"broken")
    images = dataset(FolderSource(folder))
    assert collate([images[(0, 0)]]).images is None
    with pytest.raises(ValueError, match=r"none of the 6 images.*4\.bmp"):
        require_readable(images)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_becomes_colour_or_grey(mode):
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    if mode in ("I;16", "I"):
        image = Image.fromarray(np.arange(256, dtype="u2" if mode == "I;16" else "i4").reshape(16, 16) * 257)
    elif mode == "F":
        image = Image.fromarray(np.float32(np.arange(256) / 255).reshape(16, 16))
    else:
        image = image.convert(mode)
    colour, grey = to_mode(image, 3), to_mode(image, 1)
    assert (colour.mode, grey.mode) == ("RGB", "L")
    if mode in ("L", "I;16", "I", "F"):
        assert np.array_equal(np.asarray(grey).ravel(), np.arange(256))
