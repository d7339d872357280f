"""Presets and derived numbers against each source's formula, written out on the attention matrix; known answers."""

import math

import pytest
import torch

from mimkernels import attention, head_divergence, received_attention
from mimkernels.heads import (
    BEYOND_CLS,
    PRESETS,
    QUANTITIES,
    HeadStatistics,
    Preset,
    normalized_mutual_information,
    patch_grid_positions,
    per_head_divergence,
    required_stats,
)

GRID, P, HEADS, IMAGES = 4, 1, 3, 5
N = GRID * GRID + P


def heads_of(device, sharpness=3.0, heads=HEADS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, IMAGES, heads, N, 8, generator=generator, dtype=torch.float64) * sharpness**0.5
    return q.to(device), k.to(device), v.to(device)


def matrix(q, k):
    """The attention matrix [B, H, N, N] that all sources start from."""
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)


def recorded(presets, q, k, v, *, quantities=(), unit="patch", backend="reference", **options):
    seen = HeadStatistics(presets, quantities=quantities, num_prefix=P, **options)
    positions = patch_grid_positions(GRID, seen.unit, 16, device=q.device)
    made = attention(q, k, v, num_prefix=P, positions=positions, stats=seen.row_stats, backend=backend)
    seen.update(0, made, q=q, k=k, backend=backend)
    return seen


def over_images(per_image):
    """[B, H] -> [1, H] on the CPU, as ``HeadStatistics.mean`` gives one layer."""
    return per_image.mean(0, keepdim=True).cpu()


def steps_apart():
    """Distances [N, N] between patches in steps of the grid, counted by hand."""
    distance = torch.zeros(GRID**2, GRID**2, dtype=torch.float64)
    for i in range(GRID**2):
        for j in range(GRID**2):
            distance[i, j] = math.hypot(i // GRID - j // GRID, i % GRID - j % GRID)
    return distance


def close(a, b, tolerance=1e-7):
    torch.testing.assert_close(
        a.double().cpu(), torch.as_tensor(b, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


def test_dosovitskiy_drops_cls_and_does_not_renormalise(device):
    q, k, v = heads_of(device)
    a = matrix(q, k)[:, :, 1:, 1:]
    published = (a * (16 * steps_apart()).to(device)).sum(-1).mean(-1)
    close(recorded("dosovitskiy", q, k, v).mean("distance"), over_images(published))


def test_park_renormalises_rows_and_measures_pixels(device):
    q, k, v = heads_of(device)
    a = matrix(q, k)[:, :, 1:, 1:] + 1e-32
    a = a / a.sum(-1, keepdim=True)
    published = (a * (16 * steps_apart()).to(device)).sum(-1).mean(-1)
    close(recorded("park", q, k, v).mean("renormalized_distance"), over_images(published))


def test_walmer_scales_the_image_to_one_and_leaves_empty_rows_at_zero(device):
    q, k, v = heads_of(device)
    q[:, 1, 3], k[:, 1, 0] = 100.0, 100.0  # all of one query's attention goes to [cls]
    a = matrix(q, k)[:, :, 1:, 1:]
    mass = a.sum(-1, keepdim=True)
    assert (mass == 0).any()
    a = a / (mass + (mass == 0))
    published = (a * (steps_apart() / (GRID - 1)).to(device)).sum(-1).mean(-1)
    close(recorded("walmer", q, k, v).mean("renormalized_distance"), over_images(published), 1e-6)


def test_park_mutual_information(device):
    q, k, v = heads_of(device)
    a = matrix(q, k)[:, :, 1:, 1:] + 1e-8
    a = a / a.sum(-1, keepdim=True)
    p_q = torch.full((N - P,), 1 / (N - P), dtype=torch.float64, device=device)
    p_k = (p_q[:, None] * a).sum(-2)
    information = (p_q[:, None] * a * (a / p_k[:, :, None]).log()).sum((-1, -2))
    h_q, h_k = -(p_q * p_q.log()).sum(), -(p_k * p_k.log()).sum(-1)
    close(recorded("park", q, k, v).mean("nmi"), over_images(information / (h_q * h_k).sqrt()), 1e-5)


def beyond_cls_published(a, eps=1e-6):
    """[layers, 8] from [B, H, N, N], as the source prints it."""
    patches = a[..., 1:].sum(-1)  # M_i
    own = a.diagonal(dim1=-2, dim2=-1)
    w = a[..., 1:] / (patches[..., None] + eps)
    entropy = -(w * (w + eps).log()).sum(-1)
    values = (
        a[..., 0, 0],
        own[..., 1:].mean(-1),
        a[..., 0, 0] / (patches[..., 0] + eps),
        (own[..., 1:] / (patches[..., 1:] + eps)).mean(-1),
        a[..., 0, 1:].mean(-1),
        a[..., 1:, 0].mean(-1),
        entropy[..., 0],
        entropy[..., 1:].mean(-1),
    )
    return torch.stack([value.mean() for value in values])[None]


@pytest.mark.parametrize("cls_takes_all", [False, True])
def test_beyond_cls_exactly_as_published(device, cls_takes_all):
    q, k, v = heads_of(device)
    if cls_takes_all:  # M_i near 4e-6, where both eps show
        q, k = q / 4, k / 4
        q[..., 0], k[:, :, 0, 0], k[:, :, 1:, 0] = 4.0, 10.75, 0.0
        assert 1e-6 < matrix(q, k)[..., 1:].sum(-1).median() < 1e-5
    published = beyond_cls_published(matrix(q, k))
    close(recorded("beyond_cls", q, k, v, exact_eps=True).beyond_cls(), published.cpu())
    # From row statistics: only the eps inside the logarithm is missing, worth at most N * eps.
    near = recorded("beyond_cls", q, k, v).beyond_cls()
    assert near.shape == (1, 8)
    close(near[:, :6], published[:, :6].cpu())
    above = near[:, 6:] - published[:, 6:].cpu()
    assert above.min() >= -1e-12 and above.max() <= N * 1e-6


def test_exact_eps_takes_more_rows_than_one_block(device):
    q, k, v = torch.randn(3, 1, 1, 300, 8, dtype=torch.float64, device=device)
    seen = HeadStatistics("beyond_cls", num_prefix=1, exact_eps=True)
    made = attention(q, k, v, num_prefix=1, stats=seen.row_stats, backend="reference")
    seen.update(0, made, q=q, k=k, backend="triton")  # names the ops' backend; the rows have one implementation
    close(seen.beyond_cls(), beyond_cls_published(matrix(q, k)).cpu())


def test_head_divergence_per_head_and_layer(device):
    q, k, v = heads_of(device)
    seen = recorded((), q, k, v, quantities=["head_divergence", "patch_head_divergence"])
    both_ways = recorded((), q, k, v, quantities=["head_divergence"], symmetrize=True)
    whole = matrix(q, k)
    patches = whole[:, :, 1:, 1:] / whole[:, :, 1:, 1:].sum(-1, keepdim=True)
    for name, a in (("head_divergence", whole), ("patch_head_divergence", patches)):
        kl = torch.zeros(HEADS, HEADS, dtype=torch.float64)
        for h in range(HEADS):
            for g in range(HEADS):
                kl[h, g] = (a[:, h] * (a[:, h] / a[:, g]).log()).sum(-1).mean()
        close(seen.mean(name), (kl.sum(1) / (HEADS - 1))[None])
        close(seen.layer_mean(name), kl.sum()[None] / (HEADS * (HEADS - 1)))
        if name == "head_divergence":
            close(both_ways.mean(name), ((kl + kl.T).sum(1) / 2 / (HEADS - 1))[None])
            close(both_ways.layer_mean(name), seen.layer_mean(name))


def test_divergence_of_a_single_head_is_not_a_number(device):
    q, k, _ = heads_of(device, heads=1)
    lse = (q @ k.transpose(-1, -2) * 8**-0.5).logsumexp(-1)
    assert per_head_divergence(head_divergence(q, k, lse, backend="reference")).isnan().all()


def test_entropies_and_masses_are_means_over_patch_queries(device):
    q, k, v = heads_of(device)
    a = matrix(q, k)
    patches = a[..., 1:] / a[..., 1:].sum(-1, keepdim=True)
    rows = {
        "entropy": -(a * a.log()).sum(-1),
        "patch_entropy": -(patches * patches.log()).sum(-1),
        "prefix_mass": a[..., 0],
        "patch_mass": a[..., 1:].sum(-1),
        "self_mass": a.diagonal(dim1=-2, dim2=-1),
        "peak": a.amax(-1),
    }
    seen = recorded((), q, k, v, quantities=list(rows))
    with_cls = recorded((), q, k, v, quantities=list(rows), exclude_prefix=False)
    for name, row in rows.items():
        close(seen.mean(name), over_images(row[..., 1:].mean(-1)))
        close(with_cls.mean(name), over_images(row.mean(-1)))


def test_largest_scores_are_of_an_image_and_their_keys_counted(device):
    q, k, v = heads_of(device)
    names = ["max_score", "argmax_is_prefix"]
    scores = q @ k.transpose(-1, -2) / math.sqrt(8)
    of_prefix = (scores.argmax(-1) < P).double()
    seen, with_cls = (recorded((), q, k, v, quantities=names, exclude_prefix=exclude) for exclude in (True, False))
    assert seen.row_stats == ("max_score", "argmax")
    close(seen.mean("max_score"), over_images(scores[:, :, P:].amax((2, 3))))
    close(with_cls.mean("max_score"), over_images(scores.amax((2, 3))))
    close(seen.mean("argmax_is_prefix"), over_images(of_prefix[..., P:].mean(-1)))
    close(with_cls.mean("argmax_is_prefix"), over_images(of_prefix.mean(-1)))
    assert 0 < seen.mean("argmax_is_prefix").mean() < 1


def test_images_without_a_key_do_not_count_in_the_largest_score(device):
    q, k, v = heads_of(device)
    images = len(q)
    visible = torch.ones(images, q.shape[2], dtype=torch.bool, device=device)
    visible[1] = False  # no key of this image
    seen, of_windows = (HeadStatistics(quantities=["entropy", "max_score"]) for _ in range(2))
    stats = attention(q, k, v, key_mask=visible, stats=seen.row_stats).stats
    seen.update(0, stats)
    of_windows.update(0, {name: row.repeat_interleave(images, 0) for name, row in stats.items()}, windows=images)
    largest = (q @ k.transpose(-1, -2) / math.sqrt(8)).amax((2, 3)).double()
    counted = largest[[image for image in range(images) if image != 1]]
    close(seen.mean("max_score")[0], counted.mean(0).cpu())
    close(seen.variance("max_score")[0], counted.var(0).cpu())
    assert seen.images == {0: images}  # the entropy of nothing is 0
    for copy in (HeadStatistics.from_dict(seen.to_dict()), of_windows):
        close(copy.mean("max_score"), seen.mean("max_score"))
    close(HeadStatistics.from_dict(seen.to_dict()).merge(seen).variance("max_score")[0], counted.repeat(2, 1).var(0))
    nothing = HeadStatistics(quantities=["max_score"])
    nothing.update(0, {"max_score": torch.full((2, 1, 3), -math.inf)})
    assert nothing.mean("max_score").isnan().all() and nothing.variance("max_score").isnan().all()


def test_bias_and_key_mask_reach_the_companion_ops(device):
    q, k, v = heads_of(device)
    bias = torch.randn(HEADS, N, N, dtype=torch.float64, device=device)
    key_mask = torch.ones(IMAGES, N, dtype=torch.bool, device=device)
    key_mask[:, 5] = False
    seen = HeadStatistics("park", num_prefix=P)
    given = {"bias": bias, "key_mask": key_mask, "scale": 0.2}
    positions = PRESETS["park"].positions(GRID, 16).to(device)
    made = attention(q, k, v, num_prefix=P, positions=positions, stats=seen.row_stats, backend="reference", **given)
    seen.update(0, made, q=q, k=k, backend="reference", **given)
    a = (q @ k.transpose(-1, -2) * 0.2 + bias).masked_fill(~key_mask[:, None, None], -math.inf).softmax(-1)
    a = a[:, :, 1:, 1:] / a[:, :, 1:, 1:].sum(-1, keepdim=True)
    p_k = a.mean(2)
    information = torch.special.entr(p_k).sum(-1) - torch.special.entr(a).sum(-1).mean(-1)
    close(seen.mean("nmi"), over_images(information / (math.log(N - P) * torch.special.entr(p_k).sum(-1)).sqrt()))


def test_magnitudes(device):
    x, y = torch.randn(2, IMAGES, N, 12, device=device)
    names = ["cls_magnitude", "pos_magnitude", "cls_output_magnitude", "pos_output_magnitude"]
    seen = HeadStatistics(quantities=names, num_prefix=P)
    seen.update(0, {}, tokens=x, output=y)
    for name, value in zip(names, (x[:, 0], x[:, 1:], y[:, 0], y[:, 1:]), strict=True):
        close(seen.mean(name), value.norm(dim=-1).mean()[None, None].cpu(), 1e-5)


def test_uniform_attention_shares_no_information_and_identity_all(device):
    n = 16
    uniform = torch.zeros(1, 2, n, 8, device=device)
    entropy = attention(uniform, uniform, uniform, stats=["entropy"], backend="reference")
    received = received_attention(uniform, uniform, entropy.lse, backend="reference")
    close(normalized_mutual_information(received, entropy.stats["entropy"]), torch.zeros(1, 2), 1e-5)
    one_hot = torch.eye(n, device=device).expand(1, 2, n, n)
    made = attention(one_hot * 400, one_hot, one_hot, scale=1.0, stats=["entropy"], backend="reference")
    received = received_attention(one_hot * 400, one_hot, made.lse, scale=1.0, backend="reference")
    close(normalized_mutual_information(received, made.stats["entropy"]), torch.ones(1, 2), 1e-6)
    # All queries look at one key: nothing to share, and no 0 / 0.
    single = torch.eye(n, device=device)[:1].expand(1, 2, n)
    close(normalized_mutual_information(single, torch.zeros(1, 2, n, device=device)), torch.zeros(1, 2))


def test_mean_distance_of_a_grid_known_by_hand(device):
    # 2 x 2 patches: from any of them 0, twice 1, once sqrt(2); with [cls] a fifth of the mass leaves.
    flat = torch.zeros(1, 1, 5, 8, device=device)
    for preset, expected in (
        ("dosovitskiy", 16 * (2 + math.sqrt(2)) / 5),
        ("park", 16 * (2 + math.sqrt(2)) / 4),
        ("walmer", (2 + math.sqrt(2)) / 4),
    ):
        seen = HeadStatistics(preset, num_prefix=1)
        positions = PRESETS[preset].positions(2, 16).to(device)
        made = attention(flat, flat, flat, num_prefix=1, positions=positions, stats=seen.row_stats, backend="reference")
        seen.update(0, made, q=flat, k=flat, backend="reference")
        close(seen.mean(PRESETS[preset].quantities[0]), [[expected]], 1e-5)


def test_any_backend_gives_the_same_statistics(device):
    q, k, v = (x.float() for x in heads_of(device))
    names = ["entropy", "head_divergence"]
    plain = recorded(["park", "beyond_cls"], q, k, v, quantities=names)
    first = recorded(["park", "beyond_cls"], q, k, v, quantities=names, backend="auto")
    for name in plain.names:
        close(first.mean(name), plain.mean(name), 1e-4)


def test_positions():
    close(patch_grid_positions((2, 3)), [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]])
    close(patch_grid_positions((1, 2), "pixel", (16, 8)), [[8, 4], [8, 12]])
    close(patch_grid_positions((1, 3), "unit"), [[0, 0], [0, 0.5], [0, 1]])
    assert patch_grid_positions(14).shape == (196, 2)
    assert patch_grid_positions((8, 14, 14), "pixel", (2, 16, 16)).shape == (8 * 196, 3)
    for call, told in (
        (lambda: patch_grid_positions(3, "inch"), "unknown unit 'inch'"),
        (lambda: patch_grid_positions(3, "pixel"), "need patch_size"),
        (lambda: patch_grid_positions((3, 3), "pixel", (16, 16, 16)), "does not fit the grid"),
        (lambda: patch_grid_positions(0), "at least one patch"),
        (lambda: PRESETS["beyond_cls"].positions(3), "no distances"),
    ):
        with pytest.raises(ValueError, match=told):
            call()


def test_what_a_preset_needs():
    assert required_stats("dosovitskiy") == ("distance",) == PRESETS["dosovitskiy"].row_stats
    assert set(required_stats(["park", "entropy"])) == {"distance", "patch_mass", "patch_entropy", "entropy"}
    assert set(required_stats("beyond_cls")) == {"self_mass", "patch_mass", "prefix_mass", "patch_entropy"}
    assert required_stats(Preset("mine", "here", ("peak",))) == ("peak",)
    assert all(name in QUANTITIES for name in BEYOND_CLS)
    assert [name for name, preset in PRESETS.items() if preset.renormalize] == ["park", "walmer"]
    assert all(preset.source for preset in PRESETS.values())
    with pytest.raises(ValueError, match=r"neither a preset .*park.* nor a quantity"):
        required_stats("parks")
