"""attention against its definition."""

import math

from tests.known_answers import assert_the_reference_is, dot, entropy, of_heads, probabilities


def definition(q, k, v, num_prefix, positions, stats, **others):
    scale = len(q[0][0][0]) ** -0.5
    p = of_heads(lambda a, b: probabilities(a, b, **others), q, k)
    columns = of_heads(lambda head: list(zip(*head, strict=True)), v)
    s = of_heads(lambda a, b: [[scale * dot(row, key) for key in b] for row in a], q, k)
    made = {
        "out": of_heads(lambda head, values: [[dot(row, c) for c in values] for row in head], p, columns),
        "lse": of_heads(
            lambda a, b: [math.log(math.fsum(math.exp(scale * dot(row, key)) for key in b)) for row in a], q, k
        ),
    }

    def distance(i, j):
        return 0.0 if min(i, j) < num_prefix else math.dist(positions[i - num_prefix], positions[j - num_prefix])

    of_row = {
        "entropy": lambda i, row: entropy(row),
        "prefix_mass": lambda i, row: math.fsum(row[:num_prefix]),
        "self_mass": lambda i, row: row[i],
        "distance": lambda i, row: math.fsum(weight * distance(i, j) for j, weight in enumerate(row)),
        "patch_entropy": lambda i, row: entropy([weight / math.fsum(row[num_prefix:]) for weight in row[num_prefix:]]),
        "peak": lambda i, row: max(row),
        "patch_mass": lambda i, row: math.fsum(row[num_prefix:]),
        "max_score": lambda i, row: max(row),
        "argmax": lambda i, row: row.index(max(row)),
    }
    for name in stats:
        rows = s if name == "max_score" else p
        made[name] = of_heads(lambda head, name=name: [of_row[name](i, row) for i, row in enumerate(head)], rows)
    return made


def test_the_reference_in_fp64_is_the_definition():
    assert_the_reference_is(definition, "attention")
