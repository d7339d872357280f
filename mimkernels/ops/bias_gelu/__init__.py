from mimkernels.ops.bias_gelu.api import bias_gelu as bias_gelu
