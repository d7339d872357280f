from mimkernels.ops.attention.api import AttentionOutput as AttentionOutput
from mimkernels.ops.attention.api import attention as attention
