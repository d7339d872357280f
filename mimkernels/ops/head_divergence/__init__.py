from mimkernels.ops.head_divergence.api import head_divergence as head_divergence
