"""``mimkernels dense``: labels and depths of every pixel, read from frozen encoders."""
