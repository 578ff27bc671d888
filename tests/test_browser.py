"""The report and a comparison in a real browser: quiet, drawn, offline, in light and in dark."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_files import FIGURES, HOSTILE, write_workdir
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from refine_af import comparison, comparison_report
from refine_af.report import write_report

PROGRAMS = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not all(PROGRAMS), reason="no chromium and chromedriver on the PATH: apt-get install both"
)
LEAST_CONTRAST = 4.5  # of text (WCAG 2.2, 1.4.3)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = PROGRAMS[0] or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in (
        "--headless=new",
        "--no-sandbox",  # a container's user is root
        "--disable-dev-shm-usage",
        "--window-size=1280,1600",
        "--host-resolver-rules=MAP * ~NOTFOUND",  # offline
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(PROGRAMS[1]))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of a run, and its two arms compared."""
    workdir = write_workdir(tmp_path_factory.mktemp("run"))
    runs = [comparison.open_run(f"{workdir}:{arm}") for arm in ("base", "refine_af")]
    target = tmp_path_factory.mktemp("comparison")
    comparison_report.write_comparison(runs, target)
    return {"report": write_report(workdir), "comparison": target / comparison_report.PAGE}


def show(browser: webdriver.Chrome, page: Path, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())


def colours(browser: webdriver.Chrome, element: WebElement) -> int:
    """Different colours of the pixels that are shown of it."""
    rectangle = (
        "const r = arguments[0].getBoundingClientRect(); return [r.x, r.y, r.right, r.bottom]"
    )
    scroll = "arguments[0].scrollIntoView({behavior: 'instant', block: 'center'});"
    box = browser.execute_script(scroll + rectangle, element)
    window = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    pixels = np.asarray(window.crop(tuple(map(int, box))))
    return len(np.unique(pixels.reshape(-1, 3), axis=0))


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)` (WCAG 2.2)."""
    parts = np.asarray([float(x) for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_page_is_quiet_and_drawn_and_loads_nothing(
    browser: webdriver.Chrome, pages: dict[str, Path], name: str, scheme: str
) -> None:
    show(browser, pages[name], scheme)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    drawings = browser.find_elements(By.CSS_SELECTOR, "figure svg")
    assert len(drawings) == (len(FIGURES) if name == "report" else 1)
    for drawing in drawings:
        assert min(drawing.size.values()) > 100
        assert colours(browser, drawing) > 10, drawing.get_attribute("aria-label")
    width = "return document.documentElement.scrollWidth - window.innerWidth"
    assert browser.execute_script(width) <= 0, "wider than the window"


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_light_and_dark_are_both_readable(
    browser: webdriver.Chrome, pages: dict[str, Path], name: str
) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        show(browser, pages[name], scheme)
        body = browser.find_element(By.TAG_NAME, "body")
        ink, ground = (
            luminance(body.value_of_css_property(name)) for name in ("color", "background-color")
        )
        assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= LEAST_CONTRAST
        grounds.append(ground)
    assert grounds[0] > 0.5 > grounds[1]


def test_text_of_a_model_is_shown_and_not_run(
    browser: webdriver.Chrome, pages: dict[str, Path]
) -> None:
    show(browser, pages["report"], "light")
    assert HOSTILE in browser.find_element(By.TAG_NAME, "body").text  # an alert would have raised
    assert browser.find_elements(By.TAG_NAME, "script") == []
