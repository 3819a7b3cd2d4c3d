"""``python -m lavis_uniadapter.prepare``."""

import sys

from lavis_uniadapter.tools.prepare.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
