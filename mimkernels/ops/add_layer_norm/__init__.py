from mimkernels.ops.add_layer_norm.api import AddLayerNormOutput as AddLayerNormOutput
from mimkernels.ops.add_layer_norm.api import add_layer_norm as add_layer_norm
