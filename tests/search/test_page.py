"""The page in a real browser."""

from __future__ import annotations

import json

import pytest
from browsing import (
    By,
    Keys,
    cards,
    find,
    finish,
    load,
    names,
    needs_browser,
    open_card,
    text_of,
    type_query,
    wait,
)

pytestmark = needs_browser


def test_type_a_sentence_and_see_the_hits(page, index):
    assert "7 segments of 5 files" in text_of(page, "#state")
    type_query(page, "a red circle")
    assert names(page) == [hit.file for hit in index.query("a red circle", top=24)]
    status = text_of(page, "#status")
    assert "Shortlist after" in status and "reranked after" in status
    for card in cards(page):
        image = card.find_element(By.CSS_SELECTOR, "img")
        wait(page, lambda b, image=image: image.get_property("naturalWidth") > 0)
    assert not [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]


def test_the_address_holds_the_query(page):
    type_query(page, "a red circle")
    first = names(page)
    type_query(page, "a blue star & more")
    second = names(page)
    page.back()
    wait(page, lambda b: find(b, "#text").get_property("value") == "a red circle")
    finish(page)
    wait(page, lambda b: names(b) == first)
    page.forward()
    wait(page, lambda b: find(b, "#text").get_property("value") == "a blue star & more")
    wait(page, lambda b: names(b) == second)
    load(page, "/?q=a+red+circle&least=0")
    wait(page, lambda b: names(b) == first)


def test_the_threshold_hides_and_says_what_is_best(page):
    type_query(page, "a red circle")
    number = len(cards(page))
    slide(page, 100)
    assert not cards(page)
    assert "No match reaches 100% (best: " in text_of(page, "#state")
    assert "least=100" in page.current_url
    slide(page, 0)
    assert len(cards(page)) == number and not find(page, "#state").is_displayed()


HIT = {"rank": 1, "file": "x", "start": 0, "end": 9, "best": 3, "similarity": 0.3, "segment": 1}
FAKE = """
    const [hits] = arguments;
    const line = JSON.stringify({stage: "done", seconds: 1, matched: 0, total: 0, hits});
    const before = window.fetch;
    window.fetch = async (url, ...more) =>
        String(url).startsWith("/api/search") ? new Response(line + "\\n") : before(url, ...more);
"""


def hit_with(**other):
    return {**HIT, "probability": None, "frames": [[1, 0.2, 1, 0], [4, 0.3, 1, 1]], **other}


def slide(page, value):
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    page.execute_script(script, find(page, "#threshold"), value)


def test_the_threshold_drops_what_was_not_judged_of_a_text_alone(page, media):
    page.execute_script(FAKE, [hit_with(probability=0.9, file="a"), hit_with(segment=2)])
    type_query(page, "a red circle")
    assert names(page) == ["a", "x"]
    slide(page, 1)
    assert names(page) == ["a"]
    find(page, "#file").send_keys(str(media / "a.png"))
    finish(page)
    assert names(page) == ["a", "x"]


def test_cards_keep_the_focus_while_the_list_changes(page):
    type_query(page, "a red circle")
    page.execute_script("document.querySelector('.hit').focus()")
    first = page.switch_to.active_element
    slide(page, 1)
    slide(page, 0)
    assert page.switch_to.active_element == first


def test_a_player_starts_at_the_best_segment_and_falls_back_without_pictures(page):
    page.execute_script(FAKE, [hit_with()])
    type_query(page, "a red circle")
    page.execute_script("""
        const make = document.createElement.bind(document);
        document.createElement = (name) => {
            const made = make(name);
            if (name === "video") {
                made.removeAttribute = () => {};
                Object.defineProperty(made, "src", {set(url) { window.asked = url; }});
                window.video = made;
            }
            return made;
        };
        document.querySelector(".hit").click();
    """)
    assert page.execute_script("return window.asked") == "/media/1#t=3"
    page.execute_script("window.video.onloadedmetadata()")  # sound alone: no width
    assert "cannot play the file" in text_of(page, "#screen")
    # what comes late for a hit that is not shown any more changes nothing
    page.execute_script("document.getElementById('close').click()")
    empty = "return document.getElementById('screen').children.length === 0"
    wait(page, lambda b: b.execute_script(empty))
    page.execute_script("window.video.onerror()")
    assert text_of(page, "#screen") == ""


def test_an_image_that_the_browser_cannot_show_is_shown_as_decoded(page):
    type_query(page, "a red circle")
    open_card(page, "sub/b.jpg")
    page.execute_script("document.querySelector('#screen img').onerror()")
    assert "cannot show the file" in text_of(page, "#screen")
    source = find(page, "#screen img").get_attribute("src")
    assert "/frame/" in source and source.endswith("/0.jpg")


def test_frame_bars_are_one_tab_stop_and_arrows_move(page):
    type_query(page, "a red circle")
    open_card(page, "long.mp4")
    bars = page.find_elements(By.CSS_SELECTOR, "#bars rect")
    assert [bar.get_attribute("tabindex") for bar in bars] == ["0"] + ["-1"] * 5
    bars[0].send_keys(Keys.ARROW_RIGHT)
    assert page.switch_to.active_element == bars[1]
    bars[1].send_keys(Keys.ARROW_UP)
    assert page.switch_to.active_element == bars[0]


def test_an_image_search_has_an_address_and_a_limit_of_its_own(page, media, tmp_path):
    type_query(page, "a red circle")
    with open(tmp_path / "large.png", "wb") as large:
        large.truncate(20_000_001)
    find(page, "#file").send_keys(str(tmp_path / "large.png"))
    wait(page, lambda b: "more than 20 MB" in text_of(b, "#state"))
    find(page, "#file").send_keys(str(media / "a.png"))
    finish(page)
    assert page.current_url == page.address + "/" and page.title.startswith("Like a.png")


def test_a_message_stays_when_the_slider_moves(page, tmp_path):
    (tmp_path / "fake.png").write_bytes(b"no image")
    find(page, "#file").send_keys(str(tmp_path / "fake.png"))
    wait(page, lambda b: "cannot be used" in text_of(b, "#state"))
    slide(page, 30)
    assert "cannot be used" in text_of(page, "#state")


def test_a_clip_that_the_browser_cannot_play_is_shown_by_its_frames(page):
    # OpenCV writes MPEG-4 Part 2, which no browser plays
    type_query(page, "a red circle")
    open_card(page, "long.mp4")
    wait(page, lambda b: "cannot play the file" in text_of(b, "#screen"))
    bars = page.find_elements(By.CSS_SELECTOR, "#bars rect")
    assert len(bars) == 6  # two frames of each of three segments that touch
    image = find(page, "#screen img")
    bars[-1].send_keys(Keys.ENTER)
    last = image.get_attribute("src")
    bars[0].click()
    wait(page, lambda b: image.get_attribute("src") != last)
    wait(page, lambda b: image.get_property("naturalWidth") > 0)


def test_an_image_is_shown_and_finds_more_like_it(page):
    type_query(page, "a red circle")
    open_card(page, "sub/b.jpg")
    wait(page, lambda b: find(b, "#screen img").get_property("naturalWidth") == 80)
    assert not find(page, "#bars").is_displayed()
    find(page, "#like").click()
    wait(page, lambda b: text_of(b, "#status").startswith("More like this"))
    assert names(page)[0] == "sub/b.jpg" and "like=" in page.current_url


def test_ask_about_a_clip(page):
    type_query(page, "a red circle")
    open_card(page, "short.mp4")
    find(page, "#question").send_keys("what colour?" + Keys.ENTER)
    wait(page, lambda b: "red, in short.mp4" in text_of(b, "#answer"))
    assert "1.5 s to load the model" in text_of(page, "#answer")


def test_search_by_an_image(page, tmp_path, media):
    find(page, "#file").send_keys(str(media / "a.png"))
    finish(page)
    assert names(page)[0] == "a.png" and text_of(page, "#status").startswith("Like a.png")
    (tmp_path / "fake.png").write_bytes(b"no image")
    find(page, "#file").send_keys(str(tmp_path / "fake.png"))
    wait(page, lambda b: "cannot be used" in text_of(b, "#state"))


def test_export_holds_what_is_shown(page):
    type_query(page, "a red circle")
    find(page, "#export").click()
    path = page.downloads / "hits.json"
    wait(page, lambda b: path.is_file())
    content = json.loads(path.read_text())
    assert content["query"] == {"text": "a red circle"}
    assert [hit["file"] for hit in content["hits"]] == names(page)


def test_all_of_it_by_keyboard(page):
    find(page, "body").send_keys("/")
    assert page.switch_to.active_element == find(page, "#text")
    type_query(page, "a red circle")
    for _ in range(12):
        if "hit" in (page.switch_to.active_element.get_attribute("class") or ""):
            break
        page.switch_to.active_element.send_keys(Keys.TAB)
    first = page.switch_to.active_element
    assert first == cards(page)[0]
    first.send_keys(Keys.ARROW_RIGHT)
    assert page.switch_to.active_element == cards(page)[1]
    page.switch_to.active_element.send_keys(Keys.ENTER)
    wait(page, lambda b: find(b, "#viewer").get_attribute("open"))
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    wait(page, lambda b: not find(b, "#viewer").get_attribute("open"))


def test_up_and_down_move_by_a_row_of_cards(page):
    focused = "return [...document.querySelectorAll('.hit')].indexOf(document.activeElement)"
    page.set_window_size(700, 800)
    try:
        type_query(page, "a red circle")
        tops = [card.rect["y"] for card in cards(page)]
        columns = tops.count(tops[0])
        assert 1 < columns < len(tops)
        cards(page)[0].send_keys(Keys.ARROW_DOWN)
        assert page.execute_script(focused) == columns
        for _ in range(2):  # the second time there is no row above
            page.switch_to.active_element.send_keys(Keys.ARROW_UP)
            assert page.execute_script(focused) == 0
    finally:
        page.set_window_size(1000, 800)


def test_a_phone_needs_no_sideways_scrolling(page):
    try:
        page.set_window_size(500, 800)  # Chromium's least; the page gets 360 by emulation
        metrics = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        type_query(page, "a red circle")
        assert page.execute_script("return innerWidth") == 360
        assert page.execute_script("return document.documentElement.scrollWidth") <= 360
        open_card(page, names(page)[0])
        width = page.execute_script("return document.getElementById('viewer').offsetWidth")
        assert width <= 360
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.set_window_size(1000, 800)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(page, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    type_query(page, "a red circle")
    for selector in ("#status", ".hit .name", ".hit .fact", "#controls label"):
        assert contrast(page, selector) >= 4.5, selector


def contrast(browser, selector) -> float:
    """Contrast of a text with what is behind it, by WCAG's formula."""
    script = """
        let at = document.querySelector(arguments[0]);
        const colour = getComputedStyle(at).color;
        while (getComputedStyle(at).backgroundColor === 'rgba(0, 0, 0, 0)') at = at.parentElement;
        return [colour, getComputedStyle(at).backgroundColor];
    """
    levels = []
    for colour in browser.execute_script(script, selector):
        parts = colour[colour.index("(") + 1 : -1].split(",")[:3]
        channels = [float(part) / 255 for part in parts]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        levels.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(levels) + 0.05) / (min(levels) + 0.05)
