"""What ``analyze`` measures of models whose attention was made, so that every number is known beforehand."""

import io
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mimkernels.commands.analyze.config import AnalyzeConfig
from mimkernels.commands.analyze.measure import accuracy_by_depth, measure
from mimkernels.commands.analyze.run import analyze, open_images
from mimkernels.commands.analyze.series import series_of
from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.run import pretrain
from mimkernels.engine.encoder import load_encoder
from mimkernels.engine.environment import start_accelerator
from mimkernels.engine.model_names import parse_models
from tests.commands.analyze.shown import shown

SIZES = "pretrained=false:in_chans=1:img_size=16"
VIT = f"vit_tiny_patch16_224:{SIZES}:patch_size=4:embed_dim=64:depth=1:num_heads=2"
# Maps of 8 x 8 and 4 x 4 tokens in windows of 4; the second block's are shifted by 2.
STAGES = f"{SIZES}:patch_size=2:window_size=4:embed_dim=8:depths=[2,1]:num_heads=[2,4]"
SWIN, SWINV2 = f"swin_tiny_patch4_window7_224:{STAGES}", f"swinv2_tiny_window8_256:{STAGES}"
BEIT = f"beit_base_patch16_224:{SIZES}:patch_size=4:embed_dim=16:depth=2:num_heads=2"


def measured(encoder, **changes):
    config = AnalyzeConfig(models=["m"], **{"images": 12, "batch_size": 6, "viewer_images": 0, **changes})
    return measure(
        encoder, open_images(config), config, start_accelerator("cpu", "fp32").accelerator, 0, lambda text: None
    )


def encoder_of(text):
    torch.manual_seed(0)
    return load_encoder(parse_models([f"m={text}"])[0])


@torch.no_grad()
def made_vit():
    """Tokens are unit vectors times 3; head 0 shifts, head 1 looks at [cls] with 3/4 of its attention.

    Head 0: patch (r, c) attends to patch (r, c + 1 modulo 4) alone, [cls] to itself. Head 1: every query alike, 1/4 of
    its attention spread evenly over the patches.
    """
    encoder = encoder_of(VIT)
    model, block = encoder.model, encoder.model.blocks[0]
    for weight in (model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.cls_token, model.pos_embed,
                   *block.attn.parameters(), block.mlp.fc2.weight, block.mlp.fc2.bias):  # fmt: skip
        weight.zero_()
    model.pos_embed[0, :, :17] = 3 * torch.eye(17)
    normed = block.norm1(model.pos_embed[0])  # [17, 64]
    shifted = torch.cat((torch.zeros(1, dtype=torch.int64), 1 + torch.arange(16).view(4, 4).roll(-1, 1).flatten()))
    q, k, v = block.attn.qkv.weight.view(3, 2, 32, 64).unbind()
    bias = block.attn.qkv.bias.view(3, 2, 32)
    q[0, :17, :17] = 10 * torch.eye(17)[shifted].T
    k[0, :17, :17] = 10 * torch.eye(17)
    v[0, :17, :17] = torch.eye(17)
    bias[0, 1, 0] = math.log(48) * math.sqrt(32) / (normed[0, 0] - normed[1, 0])  # 48 to 1 is 3/4 to 1/4 over 16
    k[1, 0, 0] = v[1, 0, 0] = 1
    block.attn.proj.weight[:] = torch.eye(64)
    return encoder, normed


def test_heads_that_shift_and_that_look_at_cls():
    encoder, normed = made_vit()
    result = measured(encoder, importance=2)
    heads = result.statistics()
    places = 4 * torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    apart = torch.cdist(places, places).mean().item()
    spread = 1 / 64  # of head 1, on one patch
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(spread))
    wanted = {  # of head 0, of head 1
        "distance": (6, apart / 4),  # one patch of 4 pixels, three of them from the last column to the first
        "renormalized_distance": (6, apart),
        "entropy": (0, entropy),
        "normalized_entropy": (0, entropy / math.log(17)),
        "nmi": (1, 0),
        "prefix_mass": (0, 0.75),
        "peak": (1, 0.75),
        # Queries and keys of head 0 are 10 times the tokens; of head 1, the key of [cls] is its first number.
        "max_score": (
            100 * normed[0, :17].square().sum().item() / math.sqrt(32),
            math.log(48) * (normed[0, 0] / (normed[0, 0] - normed[1, 0])).item(),
        ),
        "argmax_is_prefix": (0, 1),
        "cls_cls_attention": (1, 0.75),
        "pos_self_attention": (0, spread),
        "cls_cls_attention_adj": (1e6, 3),  # the published eps in the denominator
        "pos_self_attention_adj": (0, 1 / 16),
        "cls_pos_attention": (0, spread),
        "pos_cls_attention": (0, 0.75),
        "cls_pos_entropy": (0, math.log(16)),
        "pos_pos_entropy": (0, math.log(16)),
        "sink_attention": (1 / 17, 0.75),
        "sink_is_cls": (None, 1),  # all tokens receive as much
        "sink_is_prefix": (None, 1),
        "sink_value_norm": (1, (17 * normed[0, 0] / normed[:, 0].abs().sum()).item()),
        # KL to head 1 of a row that is all on one key; back, of rows that are not, to one that gives others nothing.
        "head_divergence": (-(math.log(0.75) + 16 * math.log(spread)) / 17, None),
    }
    assert set(wanted) == set(heads.names)
    for name, values in wanted.items():
        for head, value in enumerate(values):
            if value is not None:
                got = heads.mean(name)[0, head].item()
                assert got == pytest.approx(value, rel=1e-4, abs=2e-5), (name, head)
    # Values of head 0 and 1 side by side, through the identity.
    values = normed[:, :17]
    outputs = torch.cat((values, (0.75 * normed[0, :1] + 0.25 * normed[1:, 0].mean()).expand(17, 1)), 1).norm(dim=1)
    for name, value in (("cls_output_magnitude", outputs[0]), ("pos_output_magnitude", outputs[1])):
        assert result.statistics("outputs").mean(name).item() == pytest.approx(value.item(), rel=1e-5)
    states = result.statistics("states")
    assert states.mean("cls_magnitude")[0].item() == states.mean("pos_magnitude")[0].item() == 3
    assert states.mean("token_similarity")[0].item() == pytest.approx(0, abs=1e-6)
    assert states.mean("high_frequency")[0].item() == pytest.approx(0, abs=1e-5)  # of single points: all alike
    # Every patch's output of head 1 is the same; without it each token is changed in one direction alone.
    assert result.importance[0][0] > result.importance[0][1] > 0


def test_a_head_whose_values_are_nothing_is_worth_nothing():
    encoder, _ = made_vit()
    with torch.no_grad():
        encoder.model.blocks[0].attn.qkv.weight.view(3, 2, 32, 64)[2, 1].zero_()
    ((shift, nothing),) = measured(encoder, importance=2).importance
    assert nothing == pytest.approx(0, abs=1e-6) and shift > 0.01


def test_accuracy_is_whole_where_classes_are_apart_and_that_of_chance_where_all_are_alike():
    targets = torch.arange(60) % 3
    apart = torch.nn.functional.one_hot(targets, 3).float()
    accuracy, why = accuracy_by_depth([[apart[:40], apart[40:]], [torch.ones(40, 5), torch.ones(20, 5)]], targets)
    assert why == "" and accuracy[0] == 1 and accuracy[1] <= 0.5


def test_cka_of_states_that_no_block_changes_is_one():
    encoder = encoder_of(VIT)
    with torch.no_grad():
        for weight in (*encoder.model.blocks[0].attn.proj.parameters(), *encoder.model.blocks[0].mlp.fc2.parameters()):
            weight.zero_()
    grams = measured(encoder).grams
    assert len(grams) == 2 and grams[0].shape == (2, 6, 6)
    for gram in grams:
        torch.testing.assert_close(gram[0], gram[1])
        assert gram.abs().max() > 0


def regions(grid, size, shift):
    """``[N, N]`` which tokens of a map see each other: of one window, and on one side of where it was rolled over."""
    numbers = torch.arange(grid)
    window = (numbers - shift) % grid // size
    wrapped = (numbers < shift) & (shift > 0)
    name = torch.stack((window, wrapped.long())).T  # [grid, 2]
    rows, columns = torch.cartesian_prod(numbers, numbers).unbind(1)
    whole = torch.cat((name[rows], name[columns]), 1)
    return (whole[:, None] == whole[None]).all(-1)


@pytest.mark.parametrize("text", [SWIN, SWINV2], ids=["swin", "swinv2"])
def test_uniform_attention_in_windows(text):
    """Distances are those in the image; keys that the mask hides do not lower the entropy, nor are they information."""
    encoder = encoder_of(text)
    with torch.no_grad():
        for name, weight in encoder.model.named_parameters():
            if ".attn." in name and ("qkv" in name or "q_bias" in name or "cpb_mlp" in name or "bias_table" in name):
                weight.zero_()
    result = measured(encoder)
    heads = result.statistics()
    assert result.facts["windows"] == [4, 4, 1] and result.facts["keys"] == [16, 16, 16]
    assert result.facts["heads"] == 4 and set(heads.images.values()) == {12}
    assert not {"prefix_mass", "argmax_is_prefix", "pos_cls_attention", "sink_is_prefix", "cls_cls_attention"} & set(
        heads.names
    )
    for layer, (grid, shift, pixels) in enumerate([(8, 0, 2), (8, 2, 2), (4, 0, 4)]):
        seen = regions(grid, 4, shift)
        places = pixels * torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).float()
        counts = seen.sum(1).float()
        assert seen.sum() == (1024 if layer == 0 else 576 if layer == 1 else 256)
        wanted = {
            "distance": (torch.cdist(places, places) * seen).sum(1).div(counts).mean(),
            "entropy": counts.log().mean(),
            "normalized_entropy": 1,
            "nmi": 0,
            "head_divergence": 0,
            "peak": (1 / counts).mean(),
            "max_score": 8 if text == SWINV2 else 0,  # 16 times the sigmoid of its position bias, 0
            "pos_self_attention": (1 / counts).mean(),
            "sink_attention": 1 / 16,
        }
        for name, value in wanted.items():
            values = heads.mean(name)[layer, : 4 if layer == 2 else 2].tolist()
            assert values == pytest.approx([float(value)] * len(values), abs=2e-5), (name, layer)
    # Tokens before the first block and after each: the maps of both stages.
    assert len(result.accuracy) == 0 and [len(gram) for gram in result.grams] == [4, 4]
    assert result.statistics("states").layers == (0, 1, 2, 3)
    assert set(result.statistics("outputs").images.values()) == {12}
    assert any("8 x 8, 4 x 4" in note for note in result.notes) and any("no [cls]" in note for note in result.notes)


def test_rows_of_the_viewer_lie_in_the_window_of_their_patch():
    """All attend to the patch above, and where the window or its mask ends there, alike to all that they see."""
    encoder = encoder_of(SWIN)
    with torch.no_grad():
        for name, weight in encoder.model.named_parameters():
            if "qkv" in name or "bias_table" in name:
                weight.zero_()
            if "bias_table" in name:
                weight[(1 + 3) * 7 + 3] = 40  # of keys one row above the query
    maps, _ = shown(encoder, torch.zeros(2, 1, 16, 16, dtype=torch.uint8))
    assert maps.grid == [8, 8] and maps.queries == list(range(64)) and maps.grids == [[8, 8], [8, 8], [4, 4]]
    assert maps.weights.shape == (2, 3, 4, 64, 16) and maps.heads == [2, 2, 4]
    for layer, (grid, shift) in enumerate([(8, 0), (8, 2), (4, 0)]):
        seen = regions(grid, 4, shift)
        for row, column in ((0, 0), (1, 7), (2, 3), (4, 5), (6, 1), (7, 7)):
            at = (row * grid // 8, column * grid // 8)
            token, above = at[0] * grid + at[1], (at[0] - 1) * grid + at[1]
            wanted = seen[token] / seen[token].sum()
            if at[0] > 0 and seen[token, above]:
                wanted = torch.nn.functional.one_hot(torch.tensor(above), grid * grid).float()
            got = maps.row(1, layer, maps.query_at(row, column))
            torch.testing.assert_close(got, wanted.float().view(grid, grid), atol=3e-3, rtol=0)


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory):
    models = [f"swin={SWIN}", f"beit={BEIT}", f"vit={VIT}"]
    config = AnalyzeConfig(models=models, images=60, batch_size=20, device="cpu", workers=0, importance=2,
                           viewer_images=2, output=str(tmp_path_factory.mktemp("side")))  # fmt: skip
    return analyze(config, stream=io.StringIO())


def test_swin_and_beit_stand_beside_a_vit_on_one_scale(side_by_side):
    page = side_by_side.report.read_text()
    names = ["swin", "beit", "vit"]
    for quantity in ("distance", "normalized_entropy", "head_divergence", "nmi", "max_score", "pos_self_attention"):
        assert [one.name for one in series_of(side_by_side.models, quantity)] == names
    for quantity in ("token_similarity", "high_frequency", "pos_magnitude"):
        assert [one.name for one in series_of(side_by_side.models, quantity, part="states")] == names
    assert [one.name for one in series_of(side_by_side.models, "cls_cls_attention")] == ["beit", "vit"]
    assert all(len(run.accuracy) == run.facts["layers"] + 1 for model in side_by_side.models for run in model.runs)
    assert all(one.mean.max() <= 1 + 1e-6 for one in series_of(side_by_side.models, "normalized_entropy"))
    assert "logarithm of the number of keys that a patch can see" in page
    for text in ("swin: attention runs in windows", "16, in 1 to 4 windows", "3 x 2 to 4", "swin: it has no [cls]"):
        assert text in page
    assert len(side_by_side.numbers["cka"]) == 6


def test_sinks_of_windows_are_told_by_the_share_of_their_window(side_by_side):
    told = [text for text in side_by_side.numbers["findings"] if text.startswith("Strongest sinks of swin")]
    assert len(told) == 1 and "in its window" in told[0] and "prefix token" not in told[0]


def test_the_largest_score_and_where_patches_look_most_are_told(side_by_side):
    beit = side_by_side.models[1].runs[0].statistics()
    layer, head = divmod(int(beit.mean("max_score").argmax()), 2)
    told = side_by_side.numbers["findings"]
    score = f"{beit.mean('max_score').max().item():.3g} in beit (layer {layer + 1}, head {head + 1})"
    assert sum(text.startswith("The largest score before the softmax") and score in text for text in told) == 1
    layer = int(beit.layer_mean("sink_attention").argmax())
    share = (
        f"{100 * beit.layer_mean('argmax_is_prefix')[layer].item():.0f} % of the patches look most at a prefix token"
    )
    assert sum(text.startswith("Strongest sinks of beit") and share in text for text in told) == 1


def test_a_run_of_simmim_is_analysed(tmp_path, tiny_settings):
    sizes = {"embed_dim": 8, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4}
    own = {"method": "simmim", "model": "swinv2_tiny_window8_256", "mask_unit": 4, "patch_size": 2, "pictures": 0,
           "batch_size": 1500, "model_kwargs": sizes, "output": str(tmp_path / "run")}  # fmt: skip
    kept = {name: value for name, value in tiny_settings.items() if not name.startswith("decoder")}
    pretrain(PretrainConfig(**{**kept, **own}))
    seen = measured(load_encoder(parse_models([f"m={tmp_path / 'run'}"])[0]))
    assert seen.facts["layers"] == 3 and len(seen.grams[0]) == 4
    distance = seen.statistics().mean("distance").nan_to_num()
    assert (distance.max(1).values > 2).all()  # pixels of the image


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor holds that anything makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def test_no_tensor_of_a_pass_grows_with_the_square_of_the_tokens():
    largest = []
    for side in (64, 128):  # 257 and 1,025 tokens
        encoder = encoder_of(f"vit_tiny_patch16_224:{SIZES[:-2]}{side}:patch_size=4:embed_dim=32:depth=1:num_heads=2")
        with Largest() as seen:
            measured(encoder, images=4, batch_size=4)
        largest.append(seen.numel)
    assert largest[0] >= 4 * 257 * 32 and largest[1] <= 4.01 * largest[0] < 4 * 2 * 257**2
