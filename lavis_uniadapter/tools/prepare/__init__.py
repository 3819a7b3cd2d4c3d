"""Turn the files of a benchmark that circulate into annotations in LAVIS's layout, and videos into
frames that train faster.

``python -m lavis_uniadapter.prepare --help`` lists the commands.
"""
