"""UniAdapter for BLIP, as a plugin of salesforce LAVIS.

Importing this package registers its models, processors, tasks, dataset builders and runner with
LAVIS, whose own functions then find them by name.
"""

import sys

from lavis_uniadapter.version import __version__

__all__ = ["__version__"]

# The command line imports LAVIS and PyTorch, which take seconds, only in commands that need them.
if "uniadapter_cli" not in sys.modules:
    from lavis_uniadapter.registration import *  # noqa: F403
    from lavis_uniadapter.registration import __all__ as _registered

    __all__ += _registered  # noqa: PLE0605
