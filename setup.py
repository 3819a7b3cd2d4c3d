"""Packages of the wheel: ``projects/`` becomes the folder ``lavis_uniadapter/projects``."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["lavis_uniadapter*", "uniadapter_cli*"]),
        "lavis_uniadapter.projects",
    ],
    package_dir={"lavis_uniadapter.projects": "projects"},
)
