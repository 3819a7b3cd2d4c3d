"""A small folder of clips and images, and an index of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from lavis.common.registry import registry
from search_media import RECIPE, TINY, write_clip, write_image
from small_models import perturb

from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.distributed import destroy_process_group
from lavis_uniadapter.search import Index
from lavis_uniadapter.search.server import make_app


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> tuple[str, Path]:
    """A base checkpoint and the folder of an adapter, with weights that no default has."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    config = load_config(RECIPE, [*TINY, "run.evaluate=True"])
    cls = registry.get_model_class(config.model_cfg.arch)
    base = cls.from_config(config.model_cfg)
    perturb(base, by=0.05)
    torch.save({"model": base.state_dict()}, folder / "base.pth")
    config.model_cfg.pretrained = str(folder / "base.pth")
    model = cls.from_config(config.model_cfg)
    perturb(model.adapters, by=0.1)
    model.save_adapter(folder / "adapter")
    return str(folder / "base.pth"), folder / "adapter"


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> Path:
    """Three clips, one of them long, two images and a file that is no video."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "sub").mkdir()
    write_clip(folder / "short.mp4", 2, seed=1)
    write_clip(folder / "long.mp4", 9, seed=2)
    write_clip(folder / "sub/other.mp4", 2, seed=3)
    write_image(folder / "a.png", seed=4)
    write_image(folder / "sub/b.jpg", seed=5)
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "notes.txt").write_text("not indexed")
    return folder


@pytest.fixture(scope="session")
def options(trained) -> list[str]:
    return [*TINY, f"model.pretrained={trained[0]}"]


@pytest.fixture
def build(options, trained, tmp_path):
    """Build an index, or bring it up to date."""

    def start(source, folder=None, cfg=RECIPE, **arguments):
        arguments = {"adapter": trained[1], "window": 3.0, "workers": 0, **arguments}
        return Index.build(folder or tmp_path / "index", source, cfg, options, **arguments)

    yield start
    destroy_process_group()


@pytest.fixture(scope="session")
def built(media, options, trained, tmp_path_factory) -> Path:
    """An index of ``media``; not to be changed."""
    folder = tmp_path_factory.mktemp("built")
    Index.build(folder, media, RECIPE, options, adapter=trained[1], window=3.0, workers=0)
    destroy_process_group()
    return folder


@pytest.fixture
def index(built):
    opened = Index.open(built)
    yield opened
    opened.close()
    destroy_process_group()


@pytest.fixture
def own_media(media, tmp_path) -> Path:
    """A copy of ``media`` to change."""
    return Path(shutil.copytree(media, tmp_path / "media"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    import browsing  # where there is no Selenium, it skips what imports it

    options = browsing.webdriver.ChromeOptions()
    options.binary_location = browsing.CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    downloads = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = browsing.webdriver.Chrome(options, browsing.webdriver.ChromeService(browsing.DRIVER))
    driver.downloads = downloads
    driver.set_window_size(1000, 800)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, index):
    """The page of the index, loaded."""
    import browsing

    with browsing.serving(make_app(index, browsing.Colour())) as (address, stop):
        browser.address, browser.stop = address, stop
        browsing.load(browser, "/")
        yield browser
        browser.get("about:blank")
