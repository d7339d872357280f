from mimkernels.ops.mask_from_noise.api import mask_from_noise as mask_from_noise
