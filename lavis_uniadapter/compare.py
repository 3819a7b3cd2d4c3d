"""``python -m lavis_uniadapter.compare``."""

import sys

from lavis_uniadapter.tools.compare.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
