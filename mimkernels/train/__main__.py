"""``python -m mimkernels.train``: the ``pretrain`` command for launchers that start a Python module."""

import argparse
import sys

from mimkernels.train.cli import add_pretrain_parser


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mimkernels.train")
    add_pretrain_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["pretrain", *(sys.argv[1:] if arguments is None else arguments)])
    return args.func(args)


if __name__ == "__main__":
    sys.exit(main())
