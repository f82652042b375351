"""The built site in a browser: whole, quiet, and asking for nothing outside of its folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT
from tests.report.browser import CHROMIUM, Browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium (.ci/run does)"),
    pytest.mark.skipif(
        shutil.which("mkdocs") is None, reason="no mkdocs here: pip install -r .docs/requirements.txt (.ci/run does)"
    ),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    without_torch = "import sys; sys.modules['torch'] = None; from mkdocs.__main__ import cli; cli()"
    words = [
        sys.executable,
        "-c",
        without_torch,
        "build",
        "--strict",
        "-q",
        "-f",
        str(ROOT / ".docs" / "mkdocs.yml"),
        "-d",
        str(folder),
    ]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


# a long line scrolls inside of its code element, so that it is seen only there
COVERED = """[...document.querySelectorAll('pre button')].filter((button) => {
  const b = button.getBoundingClientRect(), c = button.closest('pre').querySelector('code').getBoundingClientRect();
  return b.width && b.left < c.right - 1 && b.right > c.left + 1 && b.top < c.bottom && b.bottom > c.top;
}).length"""


def test_every_page_is_quiet_and_fits_a_phone(site: Path, browser: Browser) -> None:
    pages = sorted(page for page in site.rglob("*.html") if page.name != "404.html")
    assert len(pages) == len(list((ROOT / ".docs" / "pages").rglob("*.md")))
    for number, page in enumerate(pages):
        browser.open(page, width=400, height=800, dark=number % 2 == 1, touch=True)
        assert not browser.complaints(), f"{page}: {browser.complaints()}"
        outside = [
            address for address in browser.asked() if not address.startswith(("file:", "data:", "blob:", "about:"))
        ]
        assert not outside, f"{page}: {outside}"
        assert browser.run("document.documentElement.scrollWidth") <= 400, f"{page} is wider than a phone"
        assert browser.run("document.querySelectorAll('h1').length") == 1
        assert browser.run("document.body.dataset.mdColorScheme") == ("slate" if number % 2 else "default"), page
        assert not browser.run(COVERED), f"{page}: a button lies on code"
        assert not browser.run("document.body.textContent.includes('generated:')")


def test_the_search_finds_without_a_server(site: Path, browser: Browser) -> None:
    browser.open(site / "index.html")
    browser.run("document.querySelector('#__search').click()")
    end, found = time.monotonic() + 60, ""
    while time.monotonic() < end and "log1mexp" not in found:
        browser.run(
            "(() => {const i = document.querySelector('.md-search__input'); i.focus(); i.value = 'clamp';"
            "i.dispatchEvent(new Event('keyup', {bubbles: true}))})()"
        )
        time.sleep(0.5)
        found = browser.run("document.querySelector('.md-search-result__list').textContent")
    assert "log1mexp" in found and not browser.complaints()
