"""``mimkernels probe``, as the command line finds it."""

from mimkernels.train.cli import add_probe_parser as add_parser

__all__ = ["add_parser"]
