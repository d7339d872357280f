"""Attention rows of the page: what is stored, and what a browser makes of it."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch

from mimkernels.commands.analyze import maps as maps_module
from mimkernels.commands.analyze.config import AnalyzeConfig
from mimkernels.commands.analyze.maps import Maps, queries_of
from mimkernels.commands.analyze.run import AnalyzeRun, open_images
from mimkernels.data.batches import Augmentation
from mimkernels.data.labelled import EncoderImages
from mimkernels.engine.encoder import load_encoder
from mimkernels.engine.model_names import parse_models
from mimkernels.heads import record_heads
from mimkernels.ops import attention_rows
from tests.commands.analyze.shown import shown

MODEL = "a=vit_tiny_patch16_224:pretrained=false:in_chans=1:img_size=16:patch_size=4:embed_dim=16:depth=2:num_heads=2"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(3)
    encoder = load_encoder(parse_models([MODEL])[0])
    for name, weight in encoder.model.named_parameters():  # heads that look somewhere
        if name.endswith("qkv.weight"):
            weight.normal_(std=0.5)
    return encoder


def test_stored_rows_are_those_of_attention(encoder):
    images = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    maps, tokens = shown(encoder, images)
    torch.testing.assert_close(tokens, encoder(images).tokens)
    assert maps.grid == [4, 4] and maps.queries == list(range(17)) and maps.stride == 1
    assert maps.weights.shape == (3, 2, 2, 17, 16) and maps.weights.dtype == torch.uint8
    with record_heads(encoder.model, keep=("q", "k")) as heads:
        encoder(images)
    for layer in range(2):
        rows = attention_rows(heads[layer].q, heads[layer].k, range(17), **heads[layer].options)
        stored = maps.weights[:, layer].float() / 255 * maps.maxima[:, layer, ..., None]
        assert ((stored - rows[..., 1:]).abs() <= 0.51 / 255 * maps.maxima[:, layer, ..., None]).all()
        torch.testing.assert_close(maps.prefix[:, layer], rows[..., :1])
    mean = rows[1, :, maps.query_at(2, 3), 1:].mean(0).view(4, 4)
    torch.testing.assert_close(maps.row(1, 1, maps.query_at(2, 3)), mean, atol=2e-3, rtol=0)
    assert maps.queries[maps.query_at(2, 3)] == 1 + 2 * 4 + 3


def test_large_models_keep_the_rows_of_every_second_patch(monkeypatch):
    monkeypatch.setattr(maps_module, "MOST_BYTES", 1000)
    assert queries_of((4, 6), 1, 40) == (list(range(25)), 1)
    queries, stride = queries_of((4, 6), 1, 100)
    assert stride == 2 and queries == [0, 1, 3, 5, 13, 15, 17]
    few = Maps([], [4, 6], 1, queries, stride, *(torch.zeros(0) for _ in range(4)))
    assert [few.query_at(*at) for at in ((0, 0), (1, 1), (0, 2), (3, 5))] == [1, 1, 2, 6]


@pytest.fixture(scope="module")
def page(tmp_path_factory, encoder):
    """A page with the viewer, and the maps in it."""
    folder = tmp_path_factory.mktemp("page")
    config = AnalyzeConfig(
        models=[MODEL], images=12, batch_size=12, viewer_images=3, device="cpu", workers=0, output=str(folder / "out")
    )
    result = AnalyzeRun(config).execute()
    return result.report.read_text(), Maps(**result.models[0].runs[0].maps), folder


def test_the_page_holds_the_viewer(page):
    text, maps, _ = page
    assert 'id="viewer-data"' in text and text.count("data:image/png") >= len(maps.images)
    assert "Where [cls] and marked patches look" in text and "if the images had classes" in text


# The page in a frame of each width; what its viewer says after every act, and whether the page is wider than the frame.
ACTS = """
<script>
const wait = setInterval(() => {
  const $ = id => document.getElementById("viewer-" + id);
  if ($("text").textContent.startsWith("Decoding")) return;
  clearInterval(wait);
  const said = [], say = () => said.push($("text").textContent);
  const point = (canvas, type, pointerType, x, y) => {
    const box = canvas.getBoundingClientRect();
    canvas.dispatchEvent(new PointerEvent(type, { clientX: box.left + x * box.width, pointerType,
      clientY: box.top + y * box.height, bubbles: true }));
  };
  const press = (canvas, key) => canvas.dispatchEvent(new KeyboardEvent("keydown", { key }));
  say();
  $("images").children[2].click();
  point($("picture"), "pointermove", "mouse", 0.9, 0.3); say();   // row 2, column 4
  point($("maps"), "pointermove", "mouse", 0.9, 0.9); say();      // the last head of the last layer
  point($("maps"), "pointerleave", "mouse", 2, 2);
  press($("picture"), "ArrowDown"); say();
  point($("maps"), "pointerdown", "touch", 0.9, 0.9);
  point($("maps"), "pointerleave", "touch", 0.9, 0.9); say();     // a lifted finger leaves what it chose
  press($("maps"), "ArrowUp"); say();
  press($("maps"), "Escape"); say();
  point($("picture"), "pointerdown", "touch", 0.1, 0.1); say();
  $("cls").click(); say();
  const root = document.documentElement;
  parent.postMessage({ width: innerWidth, beyond: root.scrollWidth - root.clientWidth, said }, "*");
}, 20);
</script></body>"""
FRAMES = """<!doctype html><body><script>
const seen = [];
addEventListener("message", event => {
  seen.push(event.data);
  if (seen.length < 2) return;
  document.body.append(Object.assign(document.createElement("pre"), { id: "seen", textContent: JSON.stringify(seen) }));
});
for (const width of [1200, 400]) {
  const frame = Object.assign(document.createElement("iframe"), { width, height: 900, srcdoc: PAGE });
  document.body.append(frame);
}
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium")
def test_pointing_at_a_patch_shows_its_row_in_a_browser(page):
    """The page's script is run; what it says of a patch and a head must be what was measured, on phones, too."""
    text, maps, folder = page
    path = folder / "frames.html"
    path.write_text(FRAMES.replace("PAGE", json.dumps(text.replace("</body>", ACTS)).replace("<", "\\u003c")))
    options = ["--headless", "--no-sandbox", "--virtual-time-budget=10000", f"--user-data-dir={folder}/profile"]
    done = subprocess.run(
        [BROWSER, *options, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=300, check=True
    )
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)[1]))

    def wanted(image, query, layer=None, head=None):
        if layer is None:
            layer, head = divmod(int(maps.maxima[image, :, :, query].argmax()), maps.maxima.shape[2])
        row = maps.weights[image, layer, head, query].float()
        to = divmod(int((row == 255).nonzero()[0]), 4)
        most, prefix = (
            maps.maxima[image, layer, head, query].item(),
            maps.prefix[image, layer, head, query].sum().item(),
        )
        return (
            f"head {head + 1} of layer {layer + 1} gives {100 * most:.1f} % to row {to[0] + 1}, column {to[1] + 1}",
            f"{100 * prefix:.1f} % to prefix tokens",
        )

    steps = [
        ("Patch in row 3, column 3", wanted(0, maps.query_at(2, 2))),
        ("Patch in row 2, column 4", wanted(2, maps.query_at(1, 3))),
        ("Patch in row 2, column 4", wanted(2, maps.query_at(1, 3), 1, 1)),
        ("Patch in row 3, column 4", wanted(2, maps.query_at(2, 3))),
        ("Patch in row 3, column 4", wanted(2, maps.query_at(2, 3), 1, 1)),
        ("Patch in row 3, column 4", wanted(2, maps.query_at(2, 3), 0, 1)),
        ("Patch in row 3, column 4", wanted(2, maps.query_at(2, 3))),
        ("Patch in row 1, column 1", wanted(2, maps.query_at(0, 0))),
        ("Prefix token 1", wanted(2, 0)),
    ]
    assert sorted(frame["width"] for frame in seen) == [400, 1200]
    for frame in seen:
        assert frame["beyond"] <= 0, f"at {frame['width']} px the page is {frame['beyond']} px too wide"
        assert len(frame["said"]) == len(steps)
        for told, (who, parts) in zip(frame["said"], steps, strict=True):
            assert told.startswith(who) and all(part in told for part in parts), (frame["width"], told, who, parts)


def test_the_images_of_the_page_are_spread_over_the_pass(page):
    """Taken from its batches of 12, they are what they are alone."""
    _, maps, _ = page
    config = AnalyzeConfig(models=[MODEL], images=12, viewer_images=3)
    images = open_images(config)
    positions = [0, 6, 11]  # 5.5 rounds to the even one
    read = [EncoderImages(images, Augmentation(16, 1, 1.0, False), 0, False)[(0, number)][0] for number in positions]
    assert torch.equal(maps.images, torch.stack(read))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        alone, _ = shown(load_encoder(parse_models([MODEL])[0]), maps.images)
    assert (alone.weights.int() - maps.weights.int()).abs().max() <= 1
    torch.testing.assert_close(alone.maxima, maps.maxima)
