"""Convert the published files of a benchmark to LAVIS's annotations, and videos to frames.

``uniadapter prepare --help`` lists the commands.
"""
