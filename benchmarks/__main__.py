"""``python -m benchmarks`` is ``mimkernels bench run``."""

import sys

from mimkernels.cli import main

sys.exit(main(["bench", "run", *sys.argv[1:]]))
