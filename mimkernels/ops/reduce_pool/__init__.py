from mimkernels.ops.reduce_pool.api import reduce_pool as reduce_pool
