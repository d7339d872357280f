from mimkernels.ops.random_mask.api import random_mask as random_mask
