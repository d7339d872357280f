"""``mimkernels dense``: labels and depths of every pixel, and joints, read from frozen encoders."""
