"""The published algorithms of block masks, stated plainly with Python's own random numbers.

``rng`` is a ``random.Random``; masks are bool ``[h, w]`` or ``[t, h, w]``, True = masked unless said otherwise.
"""

import math

import numpy as np


def random_patches(rng, grid, keep):
    n = math.prod(grid)
    mask = np.ones(n, dtype=bool)
    mask[rng.sample(range(n), keep)] = False
    return mask.reshape(grid)


def unit(rng, grid, ratio, size):
    """SimMIM: ceil(ratio * units) of the units."""
    cells = (grid[0] // size, grid[1] // size)
    units = cells[0] * cells[1]
    mask = np.zeros(units, dtype=bool)
    mask[rng.sample(range(units), math.ceil(units * ratio))] = True
    return mask.reshape(cells).repeat(size, 0).repeat(size, 1)


def uniform(rng, grid):
    """UM-MAE: one of each 2 x 2 stays visible."""
    mask = np.ones(grid, dtype=bool)
    for y in range(0, grid[0], 2):
        for x in range(0, grid[1], 2):
            mask[y + rng.randrange(2), x + rng.randrange(2)] = False
    return mask


def block(rng, grid, target, min_patches, max_patches=None, aspect=(0.3, 1 / 0.3)):
    """BEiT: rectangles until the target is reached or ten in a row do not fit."""
    height, width = grid
    mask = np.zeros(grid, dtype=bool)
    while mask.sum() < target:
        cap = min(target - mask.sum(), max_patches or target)
        before = mask.sum()
        for _ in range(10):
            area = rng.uniform(min_patches, cap)
            ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if w < width and h < height:
                top, left = rng.randint(0, height - h), rng.randint(0, width - w)
                if 0 < h * w - mask[top : top + h, left : left + w].sum() <= cap:
                    mask[top : top + h, left : left + w] = True
                    break
        if mask.sum() == before:
            break
    return mask


def block_exact(rng, grid, target, min_patches):
    """BEiT v2: then single patches."""
    mask = block(rng, grid, target, min_patches)
    free = np.flatnonzero(~mask).tolist()
    mask.reshape(-1)[rng.sample(free, target - int(mask.sum()))] = True
    return mask


def ibot(rng, grid, ratios=((0.0, 0.0), (0.3, 0.2))):
    """iBOT: a ratio per image; its target is no whole number."""
    ratio = rng.choice([rng.uniform(mean - spread, mean + spread) for mean, spread in ratios])
    return block(rng, grid, ratio * math.prod(grid), (min(grid) // 3) ** 2)


def dinov2(rng, grid, batch, share=0.5, ratios=(0.1, 0.5)):
    """DINOv2: a list of masks for a batch."""
    tokens, masked = math.prod(grid), int(batch * share)
    edges = np.linspace(*ratios, masked + 1)
    counts = [int(tokens * rng.uniform(edges[i], edges[i + 1])) for i in range(masked)] + [0] * (batch - masked)
    masks = [block(rng, grid, count, 4, tokens // 2) for count in counts]
    rng.shuffle(masks)
    return masks


def inverse_block(rng, grid, masked, roll, aspect=(0.5, 2.0)):
    """CAPI, as published: what a rectangle has above the count is missing at its end."""
    height, width = grid
    visible = height * width - masked
    low = max(math.log(aspect[0]), math.log(visible / width**2))
    high = min(math.log(aspect[1]), math.log(height**2 / (visible + 1e-5)))
    ratio = math.exp(rng.uniform(low, high))
    h, w = math.ceil(math.sqrt(visible * ratio)), math.ceil(math.sqrt(visible / ratio))
    top, left = rng.randint(0, height - h), rng.randint(0, width - w)
    rectangle = np.zeros(grid, dtype=bool)
    rectangle[top : top + h, left : left + w] = True
    mask = np.ones(height * width, dtype=bool)
    mask[np.flatnonzero(rectangle)[:visible]] = False
    mask = mask.reshape(grid)
    return np.roll(mask, (rng.randrange(height), rng.randrange(width)), (0, 1)) if roll else mask


def multiblock(rng, grid, batch, *, published, scale=(0.15, 0.2), aspect=(0.75, 1.5), context=(0.85, 1.0), min_keep=10):
    """I-JEPA: for each image the context, True = seen, and four targets as (top, left, h, w).

    `published`: blocks never reach the last row and column, contexts keep their first patches; else blocks do, and
    contexts keep random ones.
    """
    height, width = grid

    def size(scale, aspect):
        u = rng.random()
        area = int(height * width * (scale[0] + u * (scale[1] - scale[0])))
        ratio = aspect[0] + u * (aspect[1] - aspect[0])
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        return min(h, height - 1), min(w, width - 1)

    def place(h, w):
        beyond = 0 if published else 1
        return rng.randrange(height - h + beyond), rng.randrange(width - w + beyond), h, w

    def covered(blocks):
        mask = np.zeros(grid, dtype=bool)
        for top, left, h, w in blocks:
            mask[top : top + h, left : left + w] = True
        return mask

    for_targets, for_context = size(scale, aspect), size(context, (1, 1))
    targets = [[place(*for_targets) for _ in range(4)] for _ in range(batch)]
    contexts = []
    for own in targets:
        refused = 0
        while True:
            seen = covered([place(*for_context)]) & ~covered(own[: max(4 - refused // 20, 0)])
            if seen.sum() > min_keep:
                break
            refused += 1
        contexts.append(seen)
    keep = min(int(seen.sum()) for seen in contexts)
    for seen in contexts:
        ids = np.flatnonzero(seen).tolist()
        kept = ids[:keep] if published else rng.sample(ids, keep)
        seen[:] = False
        seen.reshape(-1)[kept] = True
    return list(zip(contexts, targets, strict=True))


def multiblock3d(rng, grid, batch, blocks, scale, temporal, aspect=(0.75, 1.5)):
    """V-JEPA, but with random patches of larger contexts and unions: (context, union), True = in it."""
    frames, height, width = grid
    t = max(1, int(frames * (temporal[0] + rng.random() * (temporal[1] - temporal[0]))))
    area = int(height * width * (scale[0] + rng.random() * (scale[1] - scale[0])))
    ratio = aspect[0] + rng.random() * (aspect[1] - aspect[0])
    h, w = min(round(math.sqrt(area * ratio)), height), min(round(math.sqrt(area / ratio)), width)
    unions = []
    while len(unions) < batch:
        union = np.zeros(grid, dtype=bool)
        for _ in range(blocks):
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            start = rng.randint(0, frames - t)
            union[start : start + t, top : top + h, left : left + w] = True
        if not union.all():
            unions.append(union)

    def thinned(masks):
        keep = min(int(mask.sum()) for mask in masks)
        out = [np.zeros(math.prod(grid), dtype=bool) for _ in masks]
        for mask, own in zip(masks, out, strict=True):
            own[rng.sample(np.flatnonzero(mask).tolist(), keep)] = True
        return [own.reshape(grid) for own in out]

    return list(zip(thinned([~union for union in unions]), thinned(unions), strict=True))
