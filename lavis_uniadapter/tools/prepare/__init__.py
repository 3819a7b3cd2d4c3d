"""Convert the published files of a benchmark to LAVIS's annotations, and videos to frames.

``python -m lavis_uniadapter.prepare --help`` lists the commands.
"""
