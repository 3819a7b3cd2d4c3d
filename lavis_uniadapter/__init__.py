"""UniAdapter for BLIP, as a plugin of salesforce LAVIS.

Importing this package registers its models, processors, tasks, dataset builders and runner with
LAVIS, whose own functions then find them by name.
"""

import sys

from lavis_uniadapter.version import __version__

__all__ = ["__version__"]


def _runs_as_command() -> bool:
    """Whether this is ``uniadapter`` or ``python -m lavis_uniadapter``.

    They import LAVIS and PyTorch, which takes seconds, only for what needs them.
    """
    # While Python looks for the module of ``-m``, it imports the packages above it.
    seeks_module = sys.argv[:1] == ["-m"] and "-m" in sys.orig_argv
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if seeks_module else ""
    return "uniadapter_cli" in sys.modules or module.split(".")[0] == __name__


if not _runs_as_command():
    from lavis_uniadapter.registration import *  # noqa: F403
    from lavis_uniadapter.registration import __all__ as _registered

    __all__ += _registered  # noqa: PLE0605
