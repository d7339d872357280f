import pytest
import torch

from mimkernels.heads import CKA, gram_matrices, unbiased_hsic


def hsic_by_definition(k, l):
    n = len(k)
    one = torch.ones(n, dtype=torch.float64)
    k, l = k - torch.diag(k.diagonal()), l - torch.diag(l.diagonal())
    return (torch.trace(k @ l) + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * (one @ k @ l @ one) / (n - 2)) / (
        n * (n - 3)
    )


def features(layers, batch, tokens=5, dim=6, seed=0):
    return list(torch.randn(layers, batch, tokens, dim, generator=torch.Generator().manual_seed(seed)))


def test_hsic_is_the_published_expression():
    x, y = torch.randn(2, 9, 4, dtype=torch.float64)
    k, l = x @ x.T, y @ y.T
    made = unbiased_hsic(torch.stack([k, l]), l[None])
    torch.testing.assert_close(made, torch.stack([hsic_by_definition(k, l), hsic_by_definition(l, l)])[:, None])


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("tokens", ["all", "cls", "patch"])
def test_hsics_are_averaged_over_batches_before_dividing(tokens, rescale):
    pick = {"all": slice(None), "cls": slice(0, 1), "patch": slice(1, None)}[tokens]
    cka = CKA(tokens=tokens, rescale=rescale)
    sums = torch.zeros(3, 2, 2, dtype=torch.float64)
    for seed in range(3):
        x, y = features(2, 8, seed=seed), features(2, 8, dim=3, seed=10 + seed)
        cka.update(x, y)
        grams = [[(f := z[:, pick].flatten(1).double()) @ f.T for z in side] for side in (x, y)]
        if rescale:
            grams = [[(g - g.min()) / (g.max() - g.min()) for g in side] for side in grams]
        for i in range(2):
            for j in range(2):
                k, l = grams[0][i], grams[1][j]
                pairs = ((k, l), (k, k), (l, l))
                sums[:, i, j] += torch.stack([hsic_by_definition(*pair) for pair in pairs])
    torch.testing.assert_close(cka.result(), sums[0] / (sums[1] * sums[2]).sqrt(), rtol=1e-4, atol=1e-5)


def test_a_representation_equals_itself_rotated_scaled_and_shifted():
    x = features(3, 16)
    rotation = torch.linalg.qr(torch.randn(30, 30)).Q
    turned = [2 * z.flatten(1) @ rotation + 5 for z in x]
    cka = CKA()
    cka.update(x, turned)
    torch.testing.assert_close(cka.result().diagonal(), torch.ones(3, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    own = CKA()
    own.update(x)
    torch.testing.assert_close(own.result(), own.result().T)
    torch.testing.assert_close(own.result(), cka.result(), rtol=1e-4, atol=1e-4)


def test_unrelated_features_are_near_zero_and_a_shared_offset_does_not_hide_it():
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    y = torch.randn(512, 8, generator=torch.Generator().manual_seed(1))
    plain, offset = CKA(), CKA()
    plain.update([x], [y])
    offset.update([x + 300], [y - 200])
    assert plain.result().abs() < 0.05
    torch.testing.assert_close(offset.result(), plain.result(), rtol=1e-3, atol=1e-5)


def test_merge_equals_both():
    a, b, both = CKA(), CKA(), CKA()
    for cka in (a, both):
        cka.update(features(2, 6, seed=1))
    for cka in (b, both):
        cka.update(features(2, 7, seed=2))
    torch.testing.assert_close(CKA().merge(a).merge(b).result(), both.result())
    assert a.merge(b).batches == 2


def test_refusals():
    for call, told in (
        (lambda: CKA(tokens="some"), "unknown tokens 'some'"),
        (lambda: gram_matrices(features(2, 6), tokens="patches"), "unknown tokens 'patches'"),
        (lambda: CKA(tokens="patch", num_prefix=-1), "num_prefix must not be negative, got -1"),
        (lambda: CKA(tokens="patch", num_prefix=9).update([torch.zeros(6, 9, 2)]), "no patch tokens: num_prefix is 9"),
        (lambda: CKA().update(features(2, 3)), "at least 4 images"),
        (lambda: CKA().update(torch.zeros(2, 8, 3)), "must be a sequence"),
        (lambda: CKA().update([torch.zeros(8)]), r"must be \[B, D\]"),
        (lambda: CKA().update(features(1, 8), features(1, 7)), "x has 8 images and y has 7"),
        (lambda: CKA().result(), "no batch"),
        (lambda: CKA().merge(CKA(tokens="cls")), "set up differently"),
        (lambda: unbiased_hsic(torch.zeros(1, 5, 5), torch.zeros(1, 6, 6)), "Gram matrices"),
    ):
        with pytest.raises(ValueError, match=told):
            call()
    cka = CKA()
    cka.update(features(2, 8))
    with pytest.raises(ValueError, match=r"earlier batches had \[2, 2\] layers"):
        cka.update(features(3, 8))
