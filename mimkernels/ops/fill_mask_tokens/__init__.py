from mimkernels.ops.fill_mask_tokens.api import fill_mask_tokens as fill_mask_tokens
