"""Every page in headless Chromium, on a telephone and a desk, dark and light: contrast, keyboard, silence, no request.

Needs the packages of the extra `browser`, and Chromium.
"""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from synthetic_run import write_run

from optima.commands.demo import make_server as make_demo
from optima.commands.options import DemoConfig, WatchConfig
from optima.commands.watch import make_server as make_watch
from optima.report import write_report, write_side_by_side
from optima.report.comparison import Outcome, write_comparison

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the packages of the extra browser")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the packages of the extra browser")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

WIDTHS, SCHEMES = (390, 1100), ("light", "dark")
USABLE = 'a[href], button, input:not([type=hidden]), summary, [tabindex="0"]'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM)
        yield found
        found.close()


@contextmanager
def served(server: ThreadingHTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, and every page of files that is made of them."""
    root = tmp_path_factory.mktemp("pages")
    runs = [write_run(root / name, seed=seed, rounds=8, samples=8) for seed, name in enumerate(("one", "other"))]
    for run in runs:
        write_report(run)
    write_side_by_side(runs, root / "side_by_side.html")
    outcomes = [
        Outcome("captioning", method, seed, 60.0 + seed + 9 * place, 100.0, 900.0, runs[seed] / "report.html")
        for place, method in enumerate(("optima", "uniform", "all_modules"))
        for seed in range(2)
    ]
    write_comparison(outcomes, root / "comparison.html", command="optima compare")
    return root


Open = Callable[[str], str]


@pytest.fixture
def address(folder: Path, finished: Path, running: Path) -> Iterator[Open]:
    """The address of a page by its name; what is served is served as long as the test."""
    with ExitStack() as stack:

        def of(name: str) -> str:
            if name == "watch":
                return stack.enter_context(served(make_watch(WatchConfig([running], port=0, every=600))))
            if name == "demo":
                return stack.enter_context(served(make_demo(DemoConfig([finished], port=0, device="cpu"))))
            return (folder / name).as_uri()

        yield of


@contextmanager
def opened(browser: Any, address: str, width: int = 1100, scheme: str = "light") -> Iterator[Any]:
    """The page, which must not have complained or asked for anything elsewhere when the test is over."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_default_timeout(180_000)  # milliseconds; a busy machine is no fault of a page
    page = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    here = address if address.startswith("file:") else address.rstrip("/")
    assert [url for url in asked if not url.startswith(("data:", "blob:", here))] == []
    assert complaints == []
    context.close()


@pytest.mark.parametrize("name", ["one/report.html", "side_by_side.html", "comparison.html", "watch", "demo"])
def test_a_page_can_be_read_and_used_by_everybody(name: str, browser: Any, address: Open) -> None:
    place = address(name)
    for width, scheme in product(WIDTHS, SCHEMES):
        with opened(browser, place, width, scheme) as page:
            if name == "demo":
                page.wait_for_selector("#student p + p")
            for hidden in page.query_selector_all("details"):
                hidden.evaluate("element => element.open = true")
            found = axe.Axe().run(page)
            assert found.violations_count == 0, f"{width} px, {scheme}: {found.generate_report()}"
            assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("name", ["one/report.html", "side_by_side.html", "comparison.html", "watch", "demo"])
def test_all_that_can_be_clicked_is_reached_by_the_keyboard_and_seen_there(
    name: str, browser: Any, address: Open
) -> None:
    with opened(browser, address(name)) as page:
        if name == "demo":
            page.wait_for_selector("#student p + p")
        usable = page.evaluate(f"[...document.querySelectorAll('{USABLE}')].filter(x => x.checkVisibility()).length")
        reached = 0
        while True:
            page.keyboard.press("Tab")
            focus = page.evaluate(
                "(() => { const x = document.activeElement; if (x === document.body || x.seen) return null;"
                f" x.seen = true; return [x.matches('{USABLE}'), getComputedStyle(x).outlineStyle]; }})()"
            )
            if focus is None:
                break
            reached += focus[0]
            assert focus[1] != "none"
        assert reached == usable


def test_an_image_of_ones_own_is_asked_about(browser: Any, address: Open, tmp_path: Path) -> None:
    Image.new("RGB", (80, 60), (200, 30, 30)).save(tmp_path / "mine.png")
    with opened(browser, address("demo")) as page:
        page.wait_for_selector("#student p + p")
        before = page.inner_html(".chosen")
        page.set_input_files("input[type=file]", tmp_path / "mine.png")
        page.wait_for_selector('.chosen img[src^="blob:"]')  # not a function: the page's policy lets no text be run
        page.locator("#student p small", has_text="%").first.wait_for()
        assert page.inner_html(".chosen") != before
        assert page.query_selector_all(".gallery [aria-pressed=true]") == []


def test_an_image_of_the_gallery_is_chosen_by_the_keyboard(browser: Any, address: Open) -> None:
    with opened(browser, address("demo")) as page:
        page.wait_for_selector("#student p + p")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector(".gallery button:nth-child(2)[aria-pressed=true]")
