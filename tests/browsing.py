"""Drives the page of an index in Chromium, for tests."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
import time

import pytest
import uvicorn

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = [
    pytest.mark.processes,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="there is no chromium with chromedriver here"
    ),
]


@contextlib.contextmanager
def serving(app):
    """Serve an application on a free port; yields its address and what stops it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)

    def stop():
        server.should_exit = True
        thread.join()

    try:
        yield f"http://127.0.0.1:{port}", stop
    finally:
        stop()


class Colour:
    """Answers every question alike."""

    def answer(self, path, segment, question):
        return {"answer": f"red, in {path.name}", "loading": 1.5, "seconds": 0.2}


def wait(browser, condition):
    return WebDriverWait(browser, 60).until(condition)


def find(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def text_of(browser, selector) -> str:
    return find(browser, selector).text


def load(browser, path):
    browser.get(browser.address + path)
    wait(browser, lambda b: text_of(b, "#status") or text_of(b, "#state"))


def finish(browser):
    """Wait for the result of a query."""
    wait(browser, lambda b: "results" in text_of(b, "#status") or text_of(b, "#state"))


def cards(browser):
    return browser.find_elements(By.CSS_SELECTOR, ".hit")


def names(browser) -> list[str]:
    script = "return [...document.querySelectorAll('.hit .name')].map((each) => each.textContent)"
    return browser.execute_script(script)


def type_query(browser, text):
    field = find(browser, "#text")
    field.clear()
    field.send_keys(text + Keys.ENTER)
    finish(browser)


def open_card(browser, name):
    cards(browser)[names(browser).index(name)].click()
    wait(browser, lambda b: find(b, "#viewer").get_attribute("open"))
