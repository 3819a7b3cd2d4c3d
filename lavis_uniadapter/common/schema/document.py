"""Update ``docs/configuration.md``: ``python -m lavis_uniadapter.common.schema.document``.

What precedes the page's first table is written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis_uniadapter.common.schema import data, methods, model, processors, run, shapes
from lavis_uniadapter.common.schema.compare import PlanFile, RunEntry
from lavis_uniadapter.common.schema.section import Section

PAGE = Path(__file__).resolve().parents[3] / "docs/configuration.md"
LIMITS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
    "multipleOf": "multiple of",
}
SECTIONS: list[tuple[str, type[Section]]] = [
    ("`run`", run.RunSection),
    ("`model`: all architectures", model.ModelSection),
    *((f"`model`: `{arch}`", section) for arch, section in model.MODELS.items()),
    ("`model.vit`", model.VitSection),
    ("`model.adapter`", methods.AdapterConfig),
    ("`model.lora`", methods.LoraConfig),
    ("`datasets.<name>`", data.DatasetSection),
    ("`datasets.<name>.build_info`", data.BuildInfo),
    ("`datasets.<name>.build_info.annotations.<split>`, `.images`, `.videos`", data.Source),
    *((f"Processor `{name}`", section) for name, section in processors.PROCESSORS.items()),
    ("`datasets.shapes_image_….generate`", shapes.Stills),
    ("`datasets.shapes_….generate`", shapes.Clips),
    ("Comparison files", PlanFile),
    ("Comparison files: `base`, `runs.<name>`", RunEntry),
]


def render() -> str:
    """The page: its introduction, and a table for each section."""
    introduction, *_ = PAGE.read_text(encoding="utf-8").partition("\n## ")
    return "\n".join([introduction, *(_table(title, section) for title, section in SECTIONS)])


def _table(title: str, section: type[Section]) -> str:
    lines = [f"## {title}", "", "| key | value | default | meaning |", "|---|---|---|---|"]
    schema = section.model_json_schema()["properties"]
    own = section.__annotations__ if section in model.MODELS.values() else schema
    for key, field in section.model_fields.items():
        if key not in own:
            continue
        description = field.description or model.ModelSection.model_fields[key].description
        default = schema[key].get("default")
        shown = "see below" if isinstance(default, dict) else f"`{json.dumps(default)}`"
        shown = "required" if field.is_required() else shown
        readers = run.READ_BY.get(key) if section is run.RunSection else None
        note = f" Read by `{'`, `'.join(readers)}` only." if readers else ""
        lines.append(f"| `{key}` | {_value(schema[key])} | {shown} | {description}{note} |")
    return "\n".join(lines) + "\n"


def _value(schema: Mapping[str, Any]) -> str:
    """What a value must be, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(map(_value, schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        return ", ".join(map(str, schema.get("enum") or [schema["const"]]))
    limits = [f"{sign} {schema[key]}" for key, sign in LIMITS.items() if key in schema]
    return f"{schema.get('type', 'object')} {', '.join(limits)}".strip()


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
