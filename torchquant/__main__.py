"""``python -m torchquant`` is the command ``torchquant``."""

import sys

from .cli import main

sys.exit(main())
