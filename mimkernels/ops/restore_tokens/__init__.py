from mimkernels.ops.restore_tokens.api import restore_tokens as restore_tokens
