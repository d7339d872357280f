from mimkernels.ops.weighted_pool.api import weighted_pool as weighted_pool
