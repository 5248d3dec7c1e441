"""report.html in a real browser, from a file: it shows its charts and asks nobody for anything."""

import json
import shutil

import pytest

from moe_jax import report
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
  """A sweep of a dense arm, one of 4 experts and one of 64."""
  out = tmp_path_factory.mktemp("sweep")
  arms = {"dense": 0, "moe": 4, "bad": 64}
  statuses = {(arm, seed): "finished" for arm in arms for seed in (0, 1)}
  for arm, seed in statuses:
    workdir = report_runs.write_run(out / arm / f"seed{seed}", arm, seed, arms[arm])
    report_runs.write_eval(workdir, report_runs.LOSSES[arm][seed][-1])
    if arms[arm] and seed == 0:
      report_runs.write_routing(workdir, arms[arm])
  report_runs.write_sweep(out, statuses | {("moe", 2): "failed"})
  return report.compare(out).page


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


def assert_well(browser, page):
  """It drew every chart, asked for nothing but itself, and had nothing to complain of."""
  widths = browser.execute_script(
    "return [...document.images].map(i => i.complete && i.naturalWidth)"
  )
  assert len(widths) >= 5 and all(width > 300 for width in widths)
  sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
  asked = [
    m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"
  ]
  assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
  assert browser.get_log("browser") == []


def test_it_renders_and_asks_nobody(browser, made):
  assert "Do experts help?" in browser.find_element("tag name", "body").text
  assert_well(browser, made)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows(browser, scheme):
  for width in (1280, 400):
    emulate(browser, width, scheme)
    content, window = browser.execute_script(WIDTHS)
    assert content <= window == width
  dark = browser.execute_script("return getComputedStyle(document.documentElement).backgroundColor")
  assert (int(dark.split("(")[1].split(",")[0]) < 60) == (scheme == "dark")


def test_the_text_has_the_colours_of_its_experts(browser):
  summary = find(browser, "details summary")[0]
  assert summary.text.startswith("moe, seed 0, layer 1")
  assert not find(browser, ".text i")[0].is_displayed()
  summary.click()
  tokens = find(browser, ".text i")[:5]
  colours = [token.value_of_css_property("background-color") for token in tokens]
  assert tokens[0].is_displayed() and colours[0] == colours[4]
  assert len({*colours}) == 4 and "rgba(0, 0, 0, 0)" in colours[2]
  assert tokens[2].value_of_css_property("text-decoration-line") == "line-through"
  assert tokens[1].get_attribute("title") == "expert 1: 0.750, dropped; expert 2: 0.250"


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


def test_markup_of_runs_is_shown_as_text(browser, tmp_path):
  markup = "</script><script>injected=1</script><img src=x onerror=injected=1>\"'\x1b"
  page = report.compare(report_runs.markup_sweep(tmp_path / "out", markup)).page
  browser.get_log("performance")
  browser.get(page.as_uri())
  assert browser.execute_script("return window.injected ?? null") is None
  assert_well(browser, page)
  find(browser, "details summary")[0].click()
  assert "onerror=injected=1" in find(browser, ".text")[0].text
  assert "onerror=injected=1" in find(browser, "td")[14].text
