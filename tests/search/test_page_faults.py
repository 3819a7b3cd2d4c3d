"""The page in a real browser, when something is missing or odd."""

from __future__ import annotations

from browsing import (
    Keys,
    find,
    finish,
    load,
    names,
    needs_browser,
    open_card,
    serving,
    text_of,
    type_query,
    wait,
)
from search_media import write_image

from lavis_uniadapter.search import Index
from lavis_uniadapter.search.server import make_app

pytestmark = needs_browser


def test_a_server_that_is_gone_says_how_to_start_it(page):
    type_query(page, "a red circle")
    page.stop()
    find(page, "#text").send_keys(" again" + Keys.ENTER)
    wait(page, lambda b: "uniadapter search serve" in text_of(b, "#state"))


def test_a_picture_that_does_not_come_says_whether_the_server_is_gone(page):
    type_query(page, "a red circle")
    page.stop()
    page.execute_script("document.querySelector('.hit').click()")
    wait(page, lambda b: "server does not answer" in text_of(b, "#screen"))


def test_a_file_that_vanished_says_so(browser, build, own_media, tmp_path):
    build(own_media)
    index = Index.open(tmp_path / "index")
    with serving(make_app(index)) as (address, _):
        browser.address = address
        load(browser, "/?q=a+red+circle")
        finish(browser)
        (own_media / "short.mp4").unlink()
        open_card(browser, "short.mp4")
        wait(browser, lambda b: "cannot be read any more" in text_of(b, "#screen"))
    index.close()


def test_an_empty_index_says_what_to_do(browser, build, own_media, tmp_path):
    for path in list(own_media.rglob("*.*")):
        path.unlink()
    write_image(own_media / "a.png", seed=1)
    build(own_media)
    (own_media / "a.png").write_bytes(b"no image any more")
    build(own_media)
    index = Index.open(tmp_path / "index")
    with serving(make_app(index)) as (address, _):
        browser.address = address
        load(browser, "/")
        assert "The index is empty" in text_of(browser, "#state")
        assert "uniadapter search index" in text_of(browser, "#state")
    index.close()


def test_names_of_files_are_text_and_never_markup(browser, build, tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    name = "<img src=x onerror=document.title='bad'>.png"
    write_image(folder / name, seed=1)
    build(folder)
    index = Index.open(tmp_path / "index")
    with serving(make_app(index)) as (address, _):
        browser.address = address
        load(browser, "/?q=%3Cimg%20src=x%20onerror=alert(1)%3E")
        finish(browser)
        assert names(browser) == [name]
        open_card(browser, name)
        assert name in text_of(browser, "#title") and browser.title != "bad"
    index.close()
