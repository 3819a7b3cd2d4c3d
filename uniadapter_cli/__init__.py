"""The command ``uniadapter``.

While this package is imported, ``import lavis_uniadapter`` registers nothing with LAVIS: help,
listings and errors in a configuration need neither LAVIS nor PyTorch. What needs them imports
``lavis_uniadapter.registration``.
"""
