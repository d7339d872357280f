"""``mimkernels demo``, as the command line finds it."""

from mimkernels.train.cli import add_demo_parser as add_parser

__all__ = ["add_parser"]
