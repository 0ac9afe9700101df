"""``python -m tnt_kernels``: the console script by another name."""

import sys

from tnt_kernels.cli import main

sys.exit(main())
