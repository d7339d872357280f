"""Other people's models and code on the kernels: timm, transformers, xformers."""
