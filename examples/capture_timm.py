"""What the heads of a timm ViT do: a table, and the papers' pictures.

python examples/capture_timm.py [model]          # such as vit_base_patch16_224.mae; pretrained weights are downloaded
python examples/capture_timm.py --random-weights # nothing is downloaded
"""

import argparse

import timm
import torch

import mimkernels

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="vit_tiny_patch16_224")
parser.add_argument("--random-weights", action="store_true")
parser.add_argument("--batches", type=int, default=2)
parser.add_argument("--output", default="heads.png")
arguments = parser.parse_args()

model = timm.create_model(arguments.model, pretrained=not arguments.random_weights).eval()
size = model.pretrained_cfg["input_size"]

names = ["park", "entropy", "prefix_mass", "head_divergence"]
with torch.no_grad(), mimkernels.capture(model, names, accumulate=True) as heads:
    for _ in range(arguments.batches):
        model(torch.randn(4, *size))  # images of yours, as the model's preprocessing makes them

print(heads.table())
heads.plot(title=arguments.model).savefig(arguments.output, dpi=150)
print(f"wrote {arguments.output}")
