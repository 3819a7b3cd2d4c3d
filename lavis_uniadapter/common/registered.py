"""What is in LAVIS's registry, also without importing LAVIS, which takes seconds."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lavis_uniadapter.common import paths
from lavis_uniadapter.common.schema.shapes import GENERATED

DECORATOR = re.compile(r'^@registry\.register_(\w+)\(\s*"([^"]+)"', re.MULTILINE)
KINDS = ("task", "runner", "lr_scheduler", "model", "builder", "processor")
# The attribute that holds a model's or a dataset builder's types and their files.
TYPES = {"model": "PRETRAINED_MODEL_CONFIG_DICT", "builder": "DATASET_CONFIG_DICT"}


class Registry:
    """What is registered now. Importing LAVIS's and this package's modules registers theirs."""

    @cached_property
    def names(self) -> Mapping[str, list[str]]:
        """The names of each of ``KINDS``."""
        return {kind: sorted(self._classes(kind)) for kind in KINDS}

    def types(self, kind: str, name: str) -> Iterable[str]:
        """The types of a model or of a dataset builder."""
        return getattr(self._classes(kind)[name], TYPES[kind])

    def options(self, processor: str) -> list[str]:
        """The options of a processor: LAVIS's pass what they read to their constructor."""
        parameters = inspect.signature(self._classes("processor")[processor].__init__).parameters
        return [name for name in parameters if name != "self"]

    def _classes(self, kind: str) -> Mapping[str, Any]:
        from lavis.common.registry import registry

        return registry.mapping[f"{kind}_name_mapping"]


class Sources:
    """What the source files of LAVIS and of this package register.

    As ``Registry``; None for what a class does not say itself, but its base class perhaps.
    """

    @cached_property
    def names(self) -> Mapping[str, list[str]]:
        generated = [("builder", name) for name in GENERATED]
        found = [*self._files, *generated]
        return {kind: sorted(name for k, name in found if k == kind) for kind in KINDS}

    def types(self, kind: str, name: str) -> Iterable[str] | None:
        for statement in self._body(kind, name):
            match statement:
                case ast.Assign([ast.Name(id)], ast.Dict(keys)) if id == TYPES[kind]:
                    return [ast.literal_eval(key) for key in keys if key]
        return None

    def options(self, processor: str) -> list[str] | None:
        for statement in self._body("processor", processor):
            if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
                return [argument.arg for argument in statement.args.args[1:]]
        return None

    @cached_property
    def _files(self) -> Mapping[tuple[str, str], Path]:
        return {
            found: file
            for root in paths.package_roots()
            for file in root.rglob("*.py")
            for found in DECORATOR.findall(file.read_text(encoding="utf-8"))
        }

    def _body(self, kind: str, name: str) -> list[ast.stmt]:
        """The statements of the class that is registered."""
        file = self._files.get((kind, name))
        module = ast.parse(file.read_text(encoding="utf-8")) if file else ast.Module([], [])
        decorator = ast.dump(ast.parse(f"registry.register_{kind}({name!r})", mode="eval").body)
        classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
        found = [node for node in classes if decorator in map(ast.dump, node.decorator_list)]
        return found[0].body if found else []


@cache
def _sources() -> Sources:
    return Sources()


def in_sources() -> Sources | None:
    """What LAVIS and this package will register.

    None if LAVIS has been imported, since other code may have registered names since then, and if
    LAVIS is not installed.
    """
    return _sources() if "lavis" not in sys.modules and find_spec("lavis") else None
