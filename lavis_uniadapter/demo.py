"""``python -m lavis_uniadapter.demo``."""

import sys

from lavis_uniadapter.tools.demo import main

if __name__ == "__main__":
    sys.exit(main())
