"""Tiny models with random weights, whose attention is captured."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimkernels.ops import attention

SIZES = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


def images(batch=2, seed=4):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def tokens(batch=2, length=17, dim=48, seed=5):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed))


def livelier(model: nn.Module) -> nn.Module:
    """Weights large enough that heads differ from uniform attention and from each other."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.15)
    return model.eval()


def timm_model(name, **options):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return livelier(timm.create_model(name, **{**SIZES, **options}))


def vit(**options):
    return timm_model("vit_tiny_patch16_224", patch_size=8, **options)


def swin():
    return timm_model(
        "swin_tiny_patch4_window7_224", window_size=4, embed_dim=24, depths=(2, 2), num_heads=(3, 3), depth=None
    )


def transformers_model(name, config, *, attention="sdpa", **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    settings = getattr(transformers, config)(**{**sizes, "image_size": 32, "patch_size": 8, **options})
    return livelier(getattr(transformers, name)._from_config(settings, attn_implementation=attention))


def vit_mae(**options):
    decoder = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 96}
    return transformers_model(
        "ViTMAEForPreTraining", "ViTMAEConfig", **{f"decoder_{key}": size for key, size in decoder.items()}, **options
    )


def torchvision_vit():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    return livelier(models.VisionTransformer(32, 8, 2, 3, 48, 96, num_classes=5))


def torchvision_swin():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    return livelier(models.SwinTransformer([4, 4], 24, [2, 2], [3, 3], [4, 4], num_classes=5))


def torch_encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(48, 3, 96, batch_first=True, **options)
    return livelier(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


class HandWritten(nn.Module):
    """A block that calls scaled_dot_product_attention twice: self-attention, then on other tokens if there are any."""

    def __init__(self, dim: int = 48, heads: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x: Tensor, others: Tensor | None = None) -> Tensor:
        x = x + self.attend(x, x)
        return x if others is None else x + self.attend(x, others)

    def attend(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (
            layer(z).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, z in ((self.q, x), (self.k, y), (self.v, y))
        )
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)


class Stack(nn.Module):
    """Blocks one after the other."""

    def __init__(self, depth: int = 2, **options) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(HandWritten(**options) for _ in range(depth))

    def forward(self, x: Tensor, others: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, others)
        return x


class PlainAttention(nn.Module):
    """Attention that stores its map."""

    def __init__(self, dim: int = 48) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)


def hand_written(**options):
    torch.manual_seed(0)
    return livelier(Stack(**options))


class Seen:
    """The calls that mimkernels.attention computes."""

    def __init__(self):
        self.calls = []

    def run(self, call):
        self.calls.append(call)
        return attention(call.q, call.k, call.v, **call.options)

    def watch(self, call, note=""):
        raise AssertionError("nothing is computed elsewhere here")

    def see_patches(self, embedding, patches):
        raise AssertionError("no model here embeds its patches by other means than its convolution")
