from mimkernels.ops.attention_rows.api import attention_rows as attention_rows
