"""Search an index in a headless Chromium, open a hit, and take a screenshot of each."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

QUERY = "a large yellow triangle appears at the bottom right"


def main(index: Path, query: str = QUERY) -> None:
    """Serve the index and drive the page."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        sys.exit("error: --check needs chromium and chromedriver (Debian: chromium-driver).")
    command = [sys.executable, "-m", "uniadapter_cli", "search", "serve", "--index", str(index)]
    with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True) as server:
        try:
            while "serving" not in (line := server.stdout.readline()):
                if not line:
                    sys.exit("error: the server did not start.")
            address = line.split(" at ")[1].split()[0]
            options = webdriver.ChromeOptions()
            options.binary_location = chromium
            for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
                options.add_argument(argument)
            browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
            try:
                check(browser, address, index, query)
            finally:
                browser.quit()
        finally:
            server.terminate()


def check(browser: webdriver.Chrome, address: str, folder: Path, query: str) -> None:
    """Type a query, wait for the reranked hits, open the first."""
    browser.set_window_size(1100, 900)
    browser.get(address)
    browser.find_element(By.ID, "text").send_keys(query + Keys.ENTER)
    status = browser.find_element(By.ID, "status")
    WebDriverWait(browser, 120).until(lambda _: "reranked" in status.text)
    pictures = "return [...document.images].slice(0, 8).every((each) => each.naturalWidth)"
    WebDriverWait(browser, 20).until(lambda _: browser.execute_script(pictures))
    browser.save_screenshot(folder / "hits.png")
    print(f"{query!r}: {status.text}")
    first = browser.find_element(By.CSS_SELECTOR, ".hit")
    print(f"opened: {first.get_attribute('aria-label')}")
    first.click()
    shown = "return document.querySelector('#screen img, #screen video') !== null"
    WebDriverWait(browser, 20).until(lambda _: browser.execute_script(shown))
    browser.save_screenshot(folder / "hit.png")
    print(f"screenshots: {folder / 'hits.png'} and {folder / 'hit.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
