"""A model of transformers with its attention by mimkernels. Runs in seconds on a CPU, downloads nothing."""

import torch
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

import mimkernels
import mimkernels.integrations.transformers  # registers attn_implementation="mimkernels"

torch.manual_seed(0)
config = Dinov2WithRegistersConfig(hidden_size=192, num_hidden_layers=3, num_attention_heads=3, image_size=112)
model = Dinov2WithRegistersModel(config).eval()
images = torch.randn(2, 3, 112, 112)

with torch.inference_mode():
    before = model(images).last_hidden_state
    model.set_attn_implementation("mimkernels")  # or from_pretrained(..., attn_implementation="mimkernels")
    after = model(images).last_hidden_state
    print(f"largest difference of the outputs: {(after - before).abs().max():.1e}")
    # What its heads do, from the same pass.
    with mimkernels.capture(model, ["entropy", "prefix_mass"]) as heads:
        model(images)
print(heads.table())
