"""report.html in a real browser, from a file: it shows its charts and asks nobody for anything."""

import json
import shutil

import pytest

from moe_jax.report import page
from tests.support import report_runs

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
wait = pytest.importorskip("selenium.webdriver.support.wait")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
  "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
  "disable-background-networking", "disable-component-update", "disable-sync",
)  # fmt: skip
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not (BROWSER and DRIVER),
    reason="needs chromium and chromedriver: apt-get install chromium chromium-driver",
  ),
]
WIDTHS = "return [document.documentElement.scrollWidth, innerWidth]"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """The page of a sweep in which every text is markup."""
  markup = "</script><script>injected=1</script><img src=x onerror=injected=1>\"'\x1b"
  return page.compare(report_runs.markup_sweep(tmp_path_factory.mktemp("sweep"), markup)).page


@pytest.fixture
def browser(made, tmp_path):
  options = webdriver.ChromeOptions()
  options.binary_location = BROWSER
  for flag in (*FLAGS, "window-size=1280,900", f"user-data-dir={tmp_path / 'profile'}"):
    options.add_argument(f"--{flag}")
  options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
  service = webdriver.ChromeService(DRIVER)
  driver = webdriver.Chrome(options=options, service=service)
  driver.get("about:blank")
  driver.get_log("performance")  # what the browser's own first page asked for
  driver.get(made.as_uri())
  yield driver
  driver.quit()


def emulate(driver, width, scheme):
  features = [{"name": "prefers-color-scheme", "value": scheme}]
  driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
  size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
  driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def find(driver, css):
  return driver.find_elements("css selector", css)


def test_it_shows_every_chart_and_asks_nobody(browser, made):
  """It has nothing to complain of, and what is markup in a run is text in it."""
  sizes = "return [...document.images].map(i => i.complete && i.naturalWidth)"
  widths = browser.execute_script(sizes)
  assert len(widths) == 7 and all(width > 300 for width in widths)
  sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
  asked = [
    m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"
  ]
  assert [url for url in asked if not url.startswith("data:")] == [made.as_uri()]
  assert browser.get_log("browser") == []
  assert browser.execute_script("return window.injected ?? null") is None
  assert "onerror=injected=1" in browser.find_element("css selector", "td.left:has(.c1)").text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows(browser, scheme):
  for width in (1280, 400):
    emulate(browser, width, scheme)
    content, window = browser.execute_script(WIDTHS)
    assert content <= window == width
  dark = browser.execute_script("return getComputedStyle(document.documentElement).backgroundColor")
  assert (int(dark.split("(")[1].split(",")[0]) < 60) == (scheme == "dark")


def test_a_text_has_the_colours_of_its_experts(browser):
  find(browser, "details summary")[0].click()
  tokens = find(browser, ".text i")[:5]
  colours = [token.value_of_css_property("background-color") for token in tokens]
  assert tokens[0].is_displayed() and colours[0] == colours[4]
  assert len({*colours}) == 4 and "rgba(0, 0, 0, 0)" in colours[2]  # nobody took it
  assert "onerror=injected=1" in tokens[1].text


INJECTED = """
<script>window.injected = new Set(["script"])</script>
<img src="x" onerror="window.injected.add('event')">
<a id="link" href="javascript:void(window.injected.add('link'))">link</a>
<p id="styled" style="position: fixed">style</p>
"""
STATE = """
const style = getComputedStyle(document.getElementById("styled"));
return [[...(window.injected ?? [])].sort(), style.position];
"""


def with_injection(made, path, policy):
  """The report as it would be if some text of a run got into it as markup."""
  text = made.read_text().replace("</body>", f"{INJECTED}</body>")
  path.write_text(text if policy else text.replace("Content-Security-Policy", "nothing"))
  return path.as_uri()


def test_a_script_that_gets_into_the_page_does_not_run(browser, made, tmp_path):
  browser.get(with_injection(made, tmp_path / "page.html", policy=True))
  browser.find_element("id", "link").click()
  assert browser.execute_script(STATE) == [[], "static"]
  max_width = find(browser, "body")[0].value_of_css_property("max-width")
  assert max_width == "1320px"  # the page's own style holds
  browser.get(with_injection(made, tmp_path / "page.html", policy=False))
  browser.find_element("id", "link").click()
  # So the policy held them. The image's event comes when the browser has not found it.
  ran = [["event", "link", "script"], "fixed"]
  wait.WebDriverWait(browser, 20).until(lambda _: browser.execute_script(STATE) == ran)
