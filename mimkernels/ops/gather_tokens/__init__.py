from mimkernels.ops.gather_tokens.api import gather_tokens as gather_tokens
