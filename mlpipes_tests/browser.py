"""A page of headless Chromium, and where pictures of it are kept."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlpipes_tests.conftest import missing
from mlpipes_tests.sandbox import CHECKOUT
from mlpipes_tests.waiting import LIMIT_SECONDS, comes, until

OUTPUT = CHECKOUT / "mlpipes_tests" / "output"
_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
_SETTLING_MS = 1500
"""Fonts and animations, for the eye; nothing is asserted about it."""


_EMPTY = 20_000
"""Bytes that a screenshot of a page without content has at most."""


@contextmanager
def browser_page(height: int) -> Iterator[Any]:
    """A page of 1500 pixels' width; skips the test where there is no Chromium."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        missing("no Chromium on PATH: the UI cannot be looked at")
    from playwright.sync_api import sync_playwright

    OUTPUT.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=_FLAGS, timeout=LIMIT_SECONDS * 1000)
        try:
            page = browser.new_page(viewport={"width": 1500, "height": height})
            page.set_default_timeout(LIMIT_SECONDS * 1000)
            yield page
        finally:
            browser.close()


def see(page: Any, address: str, *shown: Any, click: Any = None) -> None:
    """Open a page, click something if that is given, and see that locators show something.

    On a busy machine a page takes back what was clicked while it still settled, or never gets what it asked for. Then a user
    loads it again, and so does this.
    """

    def is_there(*locators: Any) -> bool:
        return comes(lambda: all(each.first.is_visible() for each in locators))

    def is_seen() -> bool:
        page.goto(address)
        if click is not None:
            if not is_there(click):
                return False
            click.first.click()
        return is_there(*shown)

    until(is_seen, f"{address} shows {shown}", every=1)


def see_picture(page: Any, address: str, alternative: str, entry: Any) -> None:
    """Open a picture by a click on its entry in an asset's metadata, and see that it is one."""
    image = page.locator(f"img[alt='{alternative}']")
    see(page, address, image, click=entry)
    # The element may be there before its picture is.
    page.wait_for_function("image => image.naturalWidth > 200", arg=image.first.element_handle())


def leave(page: Any) -> None:
    """Look at nothing, while something is waited for: a page of Dagster's asks its server, and is drawn, all the time."""
    page.goto("about:blank")


def picture(page: Any, name: str) -> None:
    """Keep a screenshot of a page, on which there is something."""
    page.wait_for_timeout(_SETTLING_MS)
    path = OUTPUT / f"{name}.png"
    page.screenshot(path=path)
    assert path.stat().st_size > _EMPTY, f"next to nothing is on {path}"
