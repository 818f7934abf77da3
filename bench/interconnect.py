"""Microbenchmarks of the interconnect and of overlap: the door to ``offload bench``, with the same options.

python -m bench.interconnect --quick --html report.html
"""

from __future__ import annotations

import sys

from offload.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
