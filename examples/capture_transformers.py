"""What the heads of a transformers model do.

python examples/capture_transformers.py [model]   # of the hub, such as facebook/dinov2-small
python examples/capture_transformers.py           # DINOv2 with registers and random weights; nothing is downloaded
"""

import sys

import torch
from transformers import AutoModel, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

import mimkernels

if len(sys.argv) > 1:
    model = AutoModel.from_pretrained(sys.argv[1]).eval()
else:
    sizes = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3}
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, image_size=224, patch_size=14)).eval()

size = model.config.image_size
with torch.no_grad(), mimkernels.capture(model, ["entropy", "prefix_mass", "distance"]) as heads:
    model(pixel_values=torch.randn(2, 3, size, size))

print(heads.table())
