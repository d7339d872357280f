"""``mimkernels pretrain``, as the command line finds it."""

from mimkernels.train.cli import add_pretrain_parser as add_parser

__all__ = ["add_parser"]
