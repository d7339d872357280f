"""What an analysis keeps of the images of its viewer, without the rest of it."""

import torch

from mimkernels.commands.analyze.maps import ShownImages
from mimkernels.heads import capture


def shown(encoder, images):
    """Maps and last tokens of all images, which run in batches of two."""
    with capture(encoder.model, ["peak"], accumulate=True, keep=("q", "k")) as heads:
        rows = ShownImages(encoder, range(len(images)), heads)
        for positions in torch.arange(len(images)).split(2):
            rows.expect(positions)
            rows.add(images[positions], encoder(images[positions]).tokens)
    return rows.maps, rows.tokens
