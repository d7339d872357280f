from mimkernels.ops.masked_patch_loss.api import masked_patch_loss as masked_patch_loss
