"""The report in a real browser: `make browser` installs Chromium and runs this."""

import shutil

import pytest

pytest.importorskip("selenium", reason="needs selenium and Chromium: make browser")

import json

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from test_report import written  # noqa: F401 (a fixture)

# Relative luminance and contrast as WCAG 2 defines them.
CONTRAST = """
const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255);
const light = (c) => {
  const [r, g, b] = rgb(c).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
const style = (selector) => getComputedStyle(document.querySelector(selector));
const card = style(".block").backgroundColor;
return ["h3", ".block p", "summary", "th button", "td"].map((s) => ratio(style(s).color, card));
"""


@pytest.fixture(scope="module")
def page(written):  # noqa: F811
    """A browser that shows the report."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    browser.get((written / "report.html").as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    yield browser
    browser.quit()


def test_loads_without_an_error_and_without_the_network(page):
    assert page.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [page.current_url]
    assert page.title == "What token reduction keeps"


def test_pictures_are_there(page):
    sizes = page.execute_script("return [...document.images].map((i) => [i.naturalWidth, i.width])")
    assert len(sizes) == 16 and all(natural == 160 and shown > 100 for natural, shown in sizes)
    measure = "[s.clientWidth, s.querySelectorAll('text').length]"
    drawn = page.execute_script(f"return [...document.querySelectorAll('.figure svg')].map((s) => {measure})")
    assert len(drawn) == 8 and all(width > 150 and texts > 3 for width, texts in drawn)


def test_every_column_of_every_table_sorts_both_ways(page):
    tables = page.find_elements(By.TAG_NAME, "table")
    assert len(tables) == 4
    for table in tables:
        before = sorted(rows(page, table))
        for column, head in enumerate(table.find_elements(By.CSS_SELECTOR, "th")):
            text = "text" in (head.get_attribute("class") or "")
            for _ in range(2):
                page.execute_script("arguments[0].click()", head.find_element(By.TAG_NAME, "button"))
                found = rows(page, table)
                assert sorted(found) == before
                values = [row[column] for row in found]
                filled = [value for value in values if value]
                assert values == filled + [""] * (len(values) - len(filled))
                rising = head.get_attribute("aria-sort") == "ascending"
                key = str if text else float
                assert filled == sorted(filled, key=key, reverse=not rising)
            assert rising != text


def rows(page, table) -> list[list[str]]:
    """What the cells sort by."""
    script = "return [...arguments[0].tBodies[0].rows].map((r) => [...r.cells].map((c) => c.dataset.sort))"
    return page.execute_script(script, table)


def test_rows_are_filtered(page):
    box = page.find_element(By.CSS_SELECTOR, "input[type=search]")
    found = "[...document.querySelector('input').closest('.block').querySelectorAll('tbody tr')]"
    shown = f"return {found}.filter((r) => !r.hidden).length"
    assert page.execute_script(shown) > 6
    box.send_keys("evit tome")
    assert page.execute_script(shown) == 2
    box.clear()
    box.send_keys(" ")


@pytest.mark.parametrize("system", ["light", "dark"])
def test_light_and_dark_are_the_systems_until_chosen_and_readable(page, system):
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": system}]}
    )
    page.refresh()
    theme = "return document.documentElement.dataset.theme"
    assert page.execute_script(theme) == system
    assert min(page.execute_script(CONTRAST)) > 4.5
    ink = page.execute_script("return getComputedStyle(document.querySelector('.figure svg text')).fill")
    assert ink == page.execute_script("return getComputedStyle(document.body).color")
    page.find_element(By.ID, "theme").click()
    assert page.execute_script(theme) == {"light": "dark", "dark": "light"}[system]
    assert min(page.execute_script(CONTRAST)) > 4.5


@pytest.mark.parametrize("width", [1300, 500])
def test_nothing_sticks_out(page, width):
    page.set_window_size(width, 1000)
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("width", [1300, 500])
def test_a_link_unfolds_its_section_and_goes_there(page, width):
    page.set_window_size(width, 700)
    page.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = false; }); scrollTo(0, 0)")
    link = page.find_element(By.CSS_SELECTOR, "nav a")
    link.click()
    section = "document.getElementById(arguments[0])"
    name = link.get_attribute("href").partition("#")[2]
    assert page.execute_script(f"return {section}.open", name)
    covered = "const nav = document.querySelector('nav').getBoundingClientRect(); return Math.max(0, nav.bottom)"
    top = page.execute_script(f"return {section}.getBoundingClientRect().top", name)
    assert page.execute_script(covered) <= top < 100
