"""attention_rows against its definition; it is plain torch everywhere, without backends."""

import pytest
import torch

from mimkernels import attention_rows
from tests.known_answers import of_heads, probabilities


def definition(q, k, rows):
    matrices = of_heads(probabilities, q, k)
    return [[[head[row] for row in rows] for head in image] for image in matrices]


def test_the_reference_in_fp64_is_the_definition():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, tokens, 8, generator=generator, dtype=torch.float64) for tokens in (9, 11))
    expected = torch.tensor(definition(q.tolist(), k.tolist(), [0, 7, 7]), dtype=torch.float64)
    torch.testing.assert_close(attention_rows(q, k, [0, 7, 7]), expected, rtol=1e-10, atol=1e-10)


def test_a_row_out_of_range_is_an_index_error():
    x = torch.randn(2, 2, 6, 8)
    with pytest.raises(IndexError, match=r"6.*\[0, 6\)"):
        attention_rows(x, x, [6])
