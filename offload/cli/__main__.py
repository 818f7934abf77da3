"""``python -m offload.cli`` is ``offload``."""

import sys

from offload.cli import main

sys.exit(main())
