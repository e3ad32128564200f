"""The report in a real browser: the figure obeys its controls, and nothing is fetched or complained about."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from orchestrator.reporting.html import build_report
from orchestrator.reporting.run_source import Source
from tests.unit.reporting.sample_run import sample_ledger

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (Debian: chromium, chromium-driver)"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def page(browser: webdriver.Chrome, tmp_path_factory: pytest.TempPathFactory) -> webdriver.Chrome:
    root = tmp_path_factory.mktemp("report")
    ledger = sample_ledger(str(root / "ledger"), ("smol--good--seed0", "smol--bad--seed0"))
    file: Path = build_report(Source(ledger, {"name": "demo"}), root / "report")
    browser.get(file.as_uri())
    WebDriverWait(browser, 30).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#explorer .scatterlayer"))
    return browser


def traces(page: webdriver.Chrome) -> dict[str, list[float]]:
    """What the figure shows now: y values by the name in the legend."""
    script = "return document.getElementById('explorer').data.map(t => [t.name, Array.from(t.y)])"
    return dict(page.execute_script(script))


def test_another_metric_is_drawn_when_it_is_chosen(page: webdriver.Chrome) -> None:
    metric = Select(page.find_element(By.ID, "explorer-metric"))
    metric.select_by_value("blimp_sample/acc")
    assert sorted(traces(page)["good"]) == pytest.approx([0.69, 0.72, 0.75])
    metric.select_by_value("wikitext2/token_perplexity")
    assert sorted(traces(page)["bad"]) == pytest.approx([29 * 1.25**i + 1 for i in (1, 2, 3)], rel=1e-4)


def test_a_hidden_method_is_gone_from_figure_and_front(page: webdriver.Chrome) -> None:
    Select(page.find_element(By.ID, "explorer-metric")).select_by_value("wikitext2/token_perplexity")
    box = page.find_element(By.CSS_SELECTOR, "#explorer-methods input[value=good]")
    assert sorted(traces(page)["Pareto front"]) == pytest.approx([29 * 1.25**i for i in range(4)], rel=1e-4)
    box.click()
    shown = traces(page)
    assert "good" not in shown
    without = [29, *(29 * 1.25**i + 1 for i in (1, 2, 3))]
    assert sorted(shown["Pareto front"]) == pytest.approx(without, rel=1e-4)
    box.click()
    assert "good" in traces(page)


def test_a_number_leads_to_its_stage(page: webdriver.Chrome) -> None:
    link = page.find_element(By.CSS_SELECTOR, "td a[href^='#stage-']")
    page.execute_script("arguments[0].click()", link)
    target = page.find_element(By.ID, link.get_attribute("href").split("#")[1])
    WebDriverWait(page, 10).until(lambda _: target.is_displayed())
    assert "evaluate" in target.text


def complaints(page: webdriver.Chrome) -> list[Any]:
    """Requests that left the machine and errors in the console, since this was last asked."""
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    outside = [url for url in sent if not url.startswith(("file:", "data:"))]
    return outside + [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]


def test_nothing_is_fetched_and_no_error_is_logged(page: webdriver.Chrome) -> None:
    assert complaints(page) == []


@pytest.fixture
def emulated(page: webdriver.Chrome) -> Iterator[webdriver.Chrome]:
    """The page, as it was before when the test is done with it."""
    yield page
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def show_at(page: webdriver.Chrome, width: int, media: str = "screen", scheme: str = "light") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


def wider_than_the_page(page: webdriver.Chrome) -> int:
    """Pixels that one would have to scroll sideways."""
    script = "const page = document.documentElement; return page.scrollWidth - page.clientWidth"
    return page.execute_script(script)


def lightness(page: webdriver.Chrome) -> float:
    """Of the paper, between 0 and 255."""
    colour = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_in_both_schemes(emulated: webdriver.Chrome, width: int, scheme: str) -> None:
    show_at(emulated, width, scheme=scheme)
    emulated.refresh()
    WebDriverWait(emulated, 30).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#explorer .scatterlayer"))
    emulated.execute_script("document.querySelectorAll('details').forEach(box => { box.open = true; })")
    undrawn = "return document.querySelectorAll('.plots:not([data-drawn])').length"
    WebDriverWait(emulated, 30).until(lambda page: page.execute_script(undrawn) == 0)
    assert wider_than_the_page(emulated) <= 0
    assert (lightness(emulated) < 60) == (scheme == "dark")
    assert complaints(emulated) == []


def test_figures_that_are_open_are_drawn_before_one_scrolls(page: webdriver.Chrome) -> None:
    page.refresh()
    shown = "return [...document.querySelectorAll('.plots')].filter((box) => box.checkVisibility())"
    boxes = page.execute_script(shown)
    assert boxes
    assert all(box.get_attribute("data-drawn") for box in boxes)
    assert all(box.find_elements(By.CSS_SELECTOR, ".plot svg") for box in boxes)


def test_a_wide_table_says_that_it_goes_on(emulated: webdriver.Chrome) -> None:
    show_at(emulated, 400)
    emulated.refresh()
    box = emulated.find_element(By.CSS_SELECTOR, "#methods ~ .scroll")

    def says(name: str) -> bool:
        return name in box.get_attribute("class").split()

    WebDriverWait(emulated, 10).until(lambda _: says("more") and says("wide"))
    emulated.execute_script("arguments[0].scrollLeft = arguments[0].scrollWidth", box)
    WebDriverWait(emulated, 10).until(lambda _: not says("more"))
    show_at(emulated, 1400)
    WebDriverWait(emulated, 10).until(lambda _: not says("wide"))


def test_layers_have_whole_ticks(page: webdriver.Chrome) -> None:
    Select(page.find_element(By.ID, "explorer-axis")).select_by_value("layers")
    script = "return [...document.querySelectorAll('#explorer .xtick text')].map((tick) => tick.textContent)"
    assert page.execute_script(script) == ["7", "8", "9", "10"]
    Select(page.find_element(By.ID, "explorer-axis")).select_by_value("parameters")


def test_points_have_error_bars(page: webdriver.Chrome) -> None:
    Select(page.find_element(By.ID, "explorer-metric")).select_by_value("blimp_sample/acc")
    assert len(page.find_elements(By.CSS_SELECTOR, "#explorer .errorbar")) == 1 + 2 * 3
    Select(page.find_element(By.ID, "explorer-metric")).select_by_value("wikitext2/token_perplexity")


def test_on_paper_all_is_open_light_and_within_the_margins(emulated: webdriver.Chrome) -> None:
    closed = "return document.querySelectorAll('details:not([open]):not(.lookup)').length"
    emulated.refresh()
    before = emulated.execute_script(closed)
    show_at(emulated, 717, media="print", scheme="dark")  # A4 between Chromium's margins, in CSS pixels
    emulated.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert emulated.execute_script(closed) == 0 < before
    assert emulated.execute_script("return document.querySelectorAll('.plots:not([data-drawn])').length") == 0
    WebDriverWait(emulated, 30).until(lambda page: wider_than_the_page(page) <= 0)
    assert lightness(emulated) == 255
    emulated.execute_script("dispatchEvent(new Event('afterprint'))")
    assert emulated.execute_script(closed) == before
