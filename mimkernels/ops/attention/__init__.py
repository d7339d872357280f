from mimkernels.ops.attention.api import AttentionOutput as AttentionOutput
from mimkernels.ops.attention.api import attention as attention
from mimkernels.ops.attention.api import attention_qkvpacked as attention_qkvpacked
