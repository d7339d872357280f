from mimkernels.ops.query_pool.api import query_pool as query_pool
