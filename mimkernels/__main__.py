import sys

from mimkernels.cli import main

sys.exit(main())
