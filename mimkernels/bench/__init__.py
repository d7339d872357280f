"""Micro-benchmarks: ``mimkernels bench``."""
