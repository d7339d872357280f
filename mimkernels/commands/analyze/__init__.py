"""``mimkernels analyze``: what the heads and tokens of several models do, side by side."""
