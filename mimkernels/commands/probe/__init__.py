"""``mimkernels probe``: poolings of a frozen encoder compared."""
