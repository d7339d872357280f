"""``attn_implementation="mimkernels"``: the results of ``"sdpa"`` and ``"eager"``."""

import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="4.53")
from transformers import (  # noqa: E402
    BeitConfig,
    BeitModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

import mimkernels  # noqa: E402
import mimkernels.integrations.transformers as door  # noqa: E402
from mimkernels.nn.sdpa import observing  # noqa: E402
from tests.integrations.models import Seen  # noqa: E402

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
MODELS = {
    "vit": (ViTModel, ViTConfig, {}, 2),
    "vit_mae": (ViTMAEForPreTraining, ViTMAEConfig, DECODER, 3),
    "dinov2": (Dinov2Model, Dinov2Config, {}, 2),
    "dinov2_with_registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, {}, 2),
    "beit": (BeitModel, BeitConfig, {"use_relative_position_bias": True}, 2),
    "beit_shared_bias": (BeitModel, BeitConfig, {"use_shared_relative_position_bias": True}, 2),
}


def build(kind, implementation, **kwargs):
    model_class, config_class, extra, _ = MODELS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, **extra, **kwargs, attn_implementation=implementation)).eval()
    with torch.no_grad():  # position biases and layer scales start at, or near, zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def run(model, **options):
    """Output and gradients."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 32, 32, generator=generator, dtype=model.dtype)
    if isinstance(model, ViTMAEForPreTraining):
        options["noise"] = torch.rand(2, 16, generator=generator)
    made = model(x, **options)
    out = made.logits if isinstance(model, ViTMAEForPreTraining) else made.last_hidden_state
    out.square().sum().backward()
    found = {"out": out.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}
    return torch.cat([value.flatten() / value.norm().clamp_min(1e-3 * out.norm().item()) for value in found.values()])


@pytest.mark.parametrize("kind", MODELS)
def test_results_and_gradients_are_those_of_sdpa(kind):
    seen = Seen()
    with observing(seen):
        got = run(build(kind, "mimkernels"))
    assert len(seen.calls) == MODELS[kind][3]
    assert all((call.bias is not None) == kind.startswith("beit") for call in seen.calls)
    exact = run(build(kind, "eager").double())
    error, error_of_sdpa = ((r - exact).norm() / exact.norm() for r in (got, run(build(kind, "sdpa"))))
    assert error <= 2 * error_of_sdpa + 1e-7, f"{error:.1e}, sdpa {error_of_sdpa:.1e}"


def test_it_can_be_set_afterwards():
    model, seen = build("vit", "eager"), Seen()
    model.set_attn_implementation("mimkernels")
    with observing(seen):
        run(model)
    assert len(seen.calls) == 2


def test_it_is_captured():
    model = build("dinov2_with_registers", "mimkernels")
    with mimkernels.capture(model, ["entropy", "prefix_mass"]) as heads:
        run(model)
    assert [layer.stats["entropy"].shape for layer in heads.values()] == [(2, 2, 21)] * 2
    assert [layer.num_prefix for layer in heads.values()] == [5, 5]


def test_dropout_in_training_goes_to_pytorch():
    ours, theirs = (build("vit", name, attention_probs_dropout_prob=0.3).train() for name in ("mimkernels", "sdpa"))
    made = []
    for model in (ours, theirs):
        torch.manual_seed(4)
        made.append(run(model))
    assert torch.equal(*made)


@pytest.fixture
def warned_anew():
    door._warn_of_maps.cache_clear()
    yield
    door._warn_of_maps.cache_clear()


@pytest.mark.parametrize("kind", MODELS)
def test_attention_maps_are_those_of_eager(kind, warned_anew):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    options = {"noise": torch.rand(2, 16)} if kind == "vit_mae" else {}
    ours, eager = build(kind, "mimkernels"), build(kind, "eager")
    with pytest.warns(UserWarning, match="mimkernels.capture") as warned:
        made = ours(x, output_attentions=True, **options)
    assert len(warned) == 1
    wanted = eager(x, output_attentions=True, **options)
    assert len(made.attentions) == len(wanted.attentions) > 0
    for maps, wanted_maps in zip(made.attentions, wanted.attentions, strict=True):
        torch.testing.assert_close(maps, wanted_maps, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made[0], wanted[0], rtol=1e-4, atol=1e-4)
    seen = Seen()
    with warnings.catch_warnings(), observing(seen):
        warnings.simplefilter("error")
        assert not ours(x, **options).attentions
        assert len(seen.calls) == MODELS[kind][3]  # the next call is as fast as before
        assert ours(x, output_attentions=True, **options).attentions  # and nobody is told twice


def test_attention_maps_get_gradients_and_dropout():
    models = [build("vit", name, attention_probs_dropout_prob=0.3).train() for name in ("mimkernels", "eager")]
    for model in models:
        torch.manual_seed(4)
        maps = model(torch.ones(1, 3, 32, 32), output_attentions=True).attentions
        assert all(0.1 < (part == 0).float().mean() < 0.5 for part in maps)
        maps[1].square().sum().backward()
        assert model.layers[0].attention.q_proj.weight.grad.norm() > 0


def test_a_configuration_that_asks_for_maps_gets_them():
    model = build("vit", "eager")
    model.config.output_attentions = True
    model.set_attn_implementation("mimkernels")
    x = torch.randn(2, 3, 32, 32)
    assert [maps.shape for maps in model(x).attentions] == [(2, 2, 17, 17)] * 2
    assert not model(x, output_attentions=False).attentions


def test_maps_of_masked_causal_attention_with_grouped_heads():
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[1, 7:] = 0
    made = []
    for name in ("mimkernels", "eager"):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=50, intermediate_size=64, **sizes, attn_implementation=name)
        model = LlamaModel(config).eval()
        for mask in (None, padding):
            out = model(tokens, attention_mask=mask, output_attentions=True)
            made.append((out.last_hidden_state, out.attentions[0]))
    for ours, eager in zip(made[:2], made[2:], strict=True):
        for one, other in zip(ours, eager, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_masks_and_grouped_heads_are_prepared_as_for_sdpa():
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[1, :3] = 0
    made, seen = [], Seen()
    for name in ("mimkernels", "sdpa"):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=50, intermediate_size=64, **sizes, attn_implementation=name)
        with torch.no_grad(), observing(seen):
            made.append(LlamaModel(config).eval()(tokens, attention_mask=padding).last_hidden_state[padding.bool()])
    assert len(seen.calls) == 1
    torch.testing.assert_close(*made, atol=1e-5, rtol=1e-5)


def test_tensors_with_rules_of_their_own_are_for_pytorch():
    from torch.nn.attention.bias import causal_lower_right
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    class Tagged(torch.Tensor):
        pass

    layer = torch.nn.Module()
    q, k, v = (torch.randn(2, 2, 9, 16) for _ in range(3))
    bias = causal_lower_right(9, 9)
    made, wanted = (
        forward(layer, q, k, v, bias, is_causal=False)[0]
        for forward in (door.mimkernels_attention_forward, sdpa_attention_forward)
    )
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
    assert type(door.mimkernels_attention_forward(layer, q.as_subclass(Tagged), k, v, None)[0]) is Tagged
