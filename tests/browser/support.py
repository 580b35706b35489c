"""A headless Chromium for the console's tests and screenshots; it reaches this machine alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from tests.transport_support import wait_until

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1500,1400",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


def need_chromium() -> None:
    """Chromium's absence is a skip on a laptop and a failure where CI says that everything is there."""
    if CHROMIUM is None or CHROMEDRIVER is None:
        told = "chromium and chromedriver are not there (Debian: apt install chromium chromium-driver)"
        if os.environ.get("CI") == "true":
            pytest.fail(told)
        pytest.skip(told)


class Browser:
    """One window."""

    def __init__(self, profile: Path, *, width: int = 1360, height: int = 1000, scale: float = 1.0) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM or ""
        for argument in (*ARGUMENTS, f"--user-data-dir={profile}", f"--force-device-scale-factor={scale:g}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
        self.driver.set_page_load_timeout(30)
        self.resize(width, height)
        self.prefer("light")

    def resize(self, width: int, height: int) -> None:
        """The page's own size, whatever the window's frame takes."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 0, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        """What the reader's system says of light and dark."""
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """The visible text; '' while there is no such element, or it has just been replaced."""
        told = self.run("const e = document.querySelector(arguments[0]); return e ? e.innerText : ''", selector)
        return str(told)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait_for_text(self, selector: str, text: str, timeout_s: float = 20.0) -> str:
        """Wait until the element's text holds `text`."""

        def holds() -> str | None:
            told = self.text(selector)
            return told if text in told else None

        found: str = wait_until(holds, timeout_s, f"{text!r} in {selector}")
        return found

    def complaints(self) -> list[str]:
        """What the browser's own console says."""
        return [f"{entry['level']}: {entry['message']}" for entry in self.driver.get_log("browser")]

    def addresses(self) -> list[str]:
        """Every address that the pages asked for."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def whole_page(self) -> bytes:
        """A picture of all of it, below the fold too."""
        import base64

        told = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        return base64.b64decode(told["data"])

    def close(self) -> None:
        self.driver.quit()


@contextlib.contextmanager
def browser(profile: Path, **options: Any) -> Iterator[Browser]:
    opened = Browser(profile, **options)
    try:
        yield opened
    finally:
        opened.close()
