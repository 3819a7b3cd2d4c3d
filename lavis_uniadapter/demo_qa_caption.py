"""``python -m lavis_uniadapter.demo_qa_caption``."""

import sys

from lavis_uniadapter.tools.demo_qa_caption import main

if __name__ == "__main__":
    sys.exit(main())
