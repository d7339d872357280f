"""Statistics of tokens and sinks have the values that made tokens and made attention give."""

import math

import pytest
import torch
from torch import nn

from mimkernels import attention
from mimkernels.heads import HeadStatistics, capture, relative_log_amplitude, token_similarity
from mimkernels.heads.tokens import high_frequency

SINKS = ["sink_attention", "sink_is_cls", "sink_is_prefix", "sink_value_norm"]


def test_similarity_of_equal_orthogonal_and_opposite_tokens():
    equal = torch.randn(1, 1, 6).expand(3, 5, 6)
    orthogonal = 7 * torch.eye(6)[None, :5].expand(3, -1, -1)
    opposite = torch.stack((torch.ones(6), -torch.ones(6)))[None].expand(3, -1, -1)
    for tokens, value in ((equal, 1.0), (orthogonal, 0.0), (opposite, -1.0)):
        torch.testing.assert_close(token_similarity(tokens), torch.full((3,), value), atol=1e-6, rtol=0)
    tokens = torch.randn(2, 9, 4)
    cosines = torch.cosine_similarity(tokens[:, 2:, None], tokens[:, None, 2:], dim=-1)
    wanted = (cosines.sum((1, 2)) - 7) / (7 * 6)
    torch.testing.assert_close(token_similarity(tokens, num_prefix=2), wanted)
    assert token_similarity(tokens, num_prefix=8).isnan().all()


@pytest.mark.parametrize("grid", [(4, 4), (4, 6)])
def test_amplitudes_of_a_constant_and_a_checkerboard(grid):
    rows, columns = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    board = 1.0 - 2.0 * ((rows + columns) % 2).flatten()
    count = board.numel()
    tokens = (3 + 0.5 * board)[None, :, None].expand(2, -1, 8)
    prefix = torch.randn(2, 1, 8)
    amplitudes = relative_log_amplitude(torch.cat((prefix, tokens), 1), grid, num_prefix=1)
    assert amplitudes.shape == (2, 3) and (amplitudes[:, 0] == 0).all()
    torch.testing.assert_close(amplitudes[:, -1], torch.full((2,), math.log(0.5 / 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(high_frequency(torch.cat((prefix, tokens), 1), grid, num_prefix=1), amplitudes[:, -1])
    constant = relative_log_amplitude(torch.ones(1, count, 8), grid)
    assert constant[0, 1:].tolist() == pytest.approx([math.log(1e-6 / count)] * 2, abs=0.7)
    with pytest.raises(ValueError, match=rf"{count} patches do not fill a grid of 3 x 5"):
        relative_log_amplitude(torch.ones(1, count, 8), (3, 5))


def made_heads(sink: int, tokens: int = 6):
    """q, k, v of one head whose queries all attend to one token alone, which has a tenth of the others' value norm."""
    q = torch.ones(2, 1, tokens, 8)
    k = torch.zeros(2, 1, tokens, 8)
    k[:, :, sink] = 100.0
    v = torch.ones(2, 1, tokens, 8)
    v[:, :, sink] = 0.1
    return q, k, v


@pytest.mark.parametrize("sink, is_cls, is_prefix", [(0, 1, 1), (1, 0, 1), (4, 0, 0)])
def test_a_sink_is_found_with_its_share_and_the_norm_of_its_value(sink, is_cls, is_prefix):
    q, k, v = made_heads(sink)
    seen = HeadStatistics(quantities=SINKS, num_prefix=2)
    assert seen.inputs == ("q", "k", "lse", "v") and not seen.row_stats
    seen.update(0, attention(q, k, v), q=q, k=k, v=v)
    values = [seen.mean(name).item() for name in SINKS]
    assert values == pytest.approx([1, is_cls, is_prefix, 0.1 / ((5 + 0.1) / 6)], rel=1e-4)


def test_uniform_attention_has_no_sink():
    q, k, v = torch.zeros(2, 3, 5, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    seen = HeadStatistics(quantities=SINKS)
    seen.update(0, attention(q, k, v), q=q, k=k, v=v)
    torch.testing.assert_close(seen.mean("sink_attention"), torch.full((1, 3), 0.2, dtype=torch.float64))
    assert (seen.mean("sink_is_prefix") == 0).all()
    with pytest.raises(ValueError, match="sink_value_norm needs v, got None"):
        seen.update(0, attention(q, k, v), q=q, k=k)


class TwoTokens(nn.Module):
    """Attention of a sequence without patches, all of it to the first token."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x):
        q, k, v = made_heads(0)
        return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.1])  # with dropout the kernels do not compute the call, and only watch it
def test_capture_sees_the_values_of_sinks_and_keeps_what_it_is_told(dropout):
    model = TwoTokens(dropout)
    with capture(model, SINKS, num_prefix=1, accumulate=True, keep=("q", "lse")) as heads:
        model(torch.zeros(1))
    seen = heads.statistics
    assert [seen.mean(name).item() for name in SINKS] == pytest.approx([1, 1, 1, 0.1 / ((5 + 0.1) / 6)], rel=1e-4)
    assert heads[0].q.shape == (2, 1, 6, 8) and heads[0].lse is not None and heads[0].k is None
    with pytest.raises(ValueError, match="capture keeps of q, k, lse"):
        capture(model, SINKS, num_prefix=1, keep=("v",))


def test_statistics_of_tokens_are_recorded_on_a_grid_and_restored():
    seen = HeadStatistics(quantities=["token_similarity", "high_frequency"], num_prefix=1, grid=(2, 4))
    tokens = torch.randn(3, 9, 5)
    seen.update(0, {}, tokens=tokens)
    wanted = token_similarity(tokens, 1).double().mean()
    torch.testing.assert_close(seen.layer_mean("token_similarity")[0], wanted)
    back = HeadStatistics.from_dict(seen.to_dict())
    assert back.grid == (2, 4) and back.to_dict() == seen.to_dict()
    back.update(0, {}, tokens=tokens)
