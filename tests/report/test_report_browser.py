"""report.html in a real browser, from a file: it draws, answers, and asks nobody for anything."""

import json
import shutil

import pytest

from moe_jax import report
from tests.support import report_runs
from tests.support.sweeps import whole_sweep

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
# Colour of the heat map in the middle of expert 0's row and of the last expert's.
MAP = """
const map = document.getElementById("map"), pen = map.getContext("2d"), out = [];
for (const y of [7, map.clientHeight - 20]) {
  const r = devicePixelRatio;
  out.push(Array.from(pen.getImageData(map.width / 2, y * r, 1, 1).data).slice(0, 3));
}
return out;
"""
WIDTHS = "return [document.documentElement.scrollWidth, innerWidth]"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A sweep of a dense arm, one of 4 experts and one of 64, with a text that ends its script."""
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


def choose(driver, label):
  list_of_runs = driver.find_element("id", "run")
  list_of_runs.click()
  next(o for o in list_of_runs.find_elements("tag name", "option") if o.text == label).click()


def experts_of(driver):
  """The expert that coloured each token; None of one that nobody took."""
  return [token.get_attribute("data-e") for token in find(driver, ".tok")]


def tip_of_first(driver):
  webdriver.ActionChains(driver).move_to_element(find(driver, ".tok")[0]).perform()
  return tip(driver)


def tip(driver):
  return driver.find_element("id", "tip").text


def assert_well(browser, page):
  """It drew figures, asked for nothing but itself, and had nothing to complain of."""
  assert len(find(browser, "figure svg")) >= 5
  sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
  asked = [
    m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"
  ]
  assert asked == [page.as_uri()]
  assert browser.get_log("browser") == []


def test_it_renders_and_asks_nobody(browser, made):
  assert "Do experts help?" in browser.find_element("tag name", "body").text
  assert_well(browser, made)


def test_the_report_of_a_real_sweep(browser, shared_folder, cache):
  page = whole_sweep(shared_folder, cache).path / "out/report.html"
  browser.get_log("performance")
  browser.get(page.as_uri())
  assert_well(browser, page)
  assert len(experts_of(browser)) > 100 and "gate" in tip_of_first(browser)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows(browser, scheme):
  for width in (1280, 400):
    emulate(browser, width, scheme)
    content, window = browser.execute_script(WIDTHS)
    assert content <= window == width
  dark = browser.execute_script("return getComputedStyle(document.documentElement).backgroundColor")
  assert (int(dark.split("(")[1].split(",")[0]) < 60) == (scheme == "dark")


def test_layer_and_run_change_what_is_shown(browser):
  assert experts_of(browser) == ["0", "2", None, "3", "0"]  # token 1 went to its second choice
  layers = find(browser, "#layers button")
  assert [button.text for button in layers] == ["1", "3"]
  layers[1].click()
  assert experts_of(browser) == ["1", "3", None, "0", "1"]
  before = browser.execute_script(MAP)
  red, _, blue = before[0]
  assert red > blue  # expert 0 has twice its share
  choose(browser, "bad, seed 0")
  assert experts_of(browser) == ["1", "3", None, "4", "5"]
  assert len(find(browser, "#legend button")) == 64
  # The 63 others have a little less than their share now; in the run of 4, two thirds of it.
  after = browser.execute_script(MAP)
  assert after[0] == before[0] and after[1] != before[1]
  choose(browser, "moe, seed 1")
  assert (
    not find(browser, ".tok") and "no routing.json" in browser.find_element("id", "text-note").text
  )
  # Chromium warns of this test's own way to read the canvas; an error would be the page's.
  assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_layer_changes_the_heat_map(made, browser):
  data = json.loads(browser.execute_script("return document.getElementById('data').textContent"))
  assert [run["label"] for run in data] == [
    "moe, seed 0",
    "moe, seed 1",
    "bad, seed 0",
    "bad, seed 1",
  ]
  path = made.parent / "moe/seed0/metrics.jsonl"
  text = path.read_text()
  try:
    path.write_text(text.replace("], [0.5, ", "], [0.0, "))  # of the second layer
    browser.get(report.compare(made.parent).page.as_uri())
  finally:
    path.write_text(text)
  (red, _, blue), _ = browser.execute_script(MAP)
  assert red > blue
  find(browser, "#layers button")[1].click()
  (red, _, blue), _ = browser.execute_script(MAP)
  assert blue > red
  assert "expert 0 0.00x" in browser.find_element("id", "heat-note").text


def test_tips_and_keys(browser):
  tokens = find(browser, ".tok")
  webdriver.ActionChains(browser).move_to_element(tokens[1]).perform()
  assert tip(browser).splitlines() == [
    '"b"',
    "expert 1: gate 0.750, dropped",
    "expert 2: gate 0.250",
  ]
  assert "part" in tokens[1].get_attribute("class")
  browser.execute_script("arguments[0].focus()", tokens[0])
  assert tip(browser).splitlines()[0] == '"a"'
  right, escape = webdriver.Keys.ARROW_RIGHT, webdriver.Keys.ESCAPE
  webdriver.ActionChains(browser).send_keys(right, right).perform()
  assert tip(browser).count("dropped") == 2
  struck = browser.switch_to.active_element
  assert struck.value_of_css_property("text-decoration-line") == "line-through"
  webdriver.ActionChains(browser).send_keys(escape).perform()
  assert tip(browser) == ""
  find(browser, "#legend button")[2].click()
  assert ["dim" in t.get_attribute("class") for t in find(browser, ".tok")] == [1, 0, 1, 1, 1]


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
  text = made.read_text().replace("</main>", f"{INJECTED}</main>")
  path.write_text(text if policy else text.replace("Content-Security-Policy", "nothing"))
  return path.as_uri()


def test_a_script_that_gets_into_the_page_does_not_run(browser, made, tmp_path):
  browser.get(with_injection(made, tmp_path / "page.html", policy=True))
  browser.find_element("id", "link").click()
  assert browser.execute_script(STATE) == [[], "static"]
  assert experts_of(browser) == ["0", "2", None, "3", "0"]  # the page's own script has run
  find(browser, "#layers button")[1].click()
  assert experts_of(browser) == ["1", "3", None, "0", "1"]
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
  assert "onerror=injected=1" in browser.find_element("id", "text").text
  assert "onerror=injected=1" in find(browser, "#run option")[0].text
