"""``mimkernels demo``."""
