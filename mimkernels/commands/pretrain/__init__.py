"""``mimkernels pretrain``: masked-image-modelling pre-training of Vision Transformers."""
