"""``python -m tnt_kernels``: the console script by another name."""

import sys

from .cli import main

sys.exit(main())
