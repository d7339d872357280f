"""The CPU library's kernels for AVX-512 and AMX, run as they were compiled, on CPUs that have neither."""
