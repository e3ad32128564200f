"""The report in a real browser: the figure obeys its controls, and nothing is fetched or complained about."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from orchestrator.report.html import Source, build_report
from tests.unit.orchestrator.report.sample_run import sample_ledger

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


def test_nothing_is_fetched_and_no_error_is_logged(page: webdriver.Chrome) -> None:
    events: list[dict[str, Any]] = [
        json.loads(entry["message"])["message"] for entry in page.get_log("performance")
    ]
    sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in sent if not url.startswith(("file:", "data:"))] == []
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
