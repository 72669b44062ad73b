"""A real browser, a real JupyterLab, and the built pages, without a network.

The tests skip where the browser or its driver is absent; `make browser`, which installs both, sets VLA_BENCH_BROWSER,
and then nothing is skipped. VLA_BENCH_SCREENSHOTS=FOLDER keeps what each test saw.
"""

import functools
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
LIMIT_S = 150.0
REQUIRED = bool(os.environ.get("VLA_BENCH_BROWSER"))


@pytest.fixture(scope="session")
def absent():
    """Leaves a test out, with its reason; in `make browser` that is a failure."""

    def tell(reason: str) -> None:
        (pytest.fail if REQUIRED else pytest.skip)(f"{reason} (make browser)")

    return tell


@pytest.fixture(scope="session")
def driver(absent):
    """Chromium without a window, whose only host is this machine."""
    try:
        from selenium import webdriver
    except ImportError:
        absent("selenium is absent")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    control = shutil.which("chromedriver")
    if not browser or not control:
        absent(f"{'a chromedriver' if browser else 'Chromium'} is absent")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    words += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--hide-scrollbars"]
    for word in words:
        options.add_argument(word)
    chrome = webdriver.Chrome(options, webdriver.ChromeService(control, log_output=subprocess.DEVNULL))
    chrome.set_page_load_timeout(LIMIT_S)
    chrome.set_script_timeout(LIMIT_S)
    yield chrome
    chrome.quit()


@dataclass
class Window:
    """What a test does with the browser. Waiting is always for a condition."""

    driver: Any

    def size(self, width: int, height: int) -> None:
        """Sets the visible part of a page, in pixels."""
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)

    def run(self, script: str, *words: Any) -> Any:
        """What a piece of JavaScript returns."""
        return self.driver.execute_script(script, *words)

    def wait(self, condition: Any, what: str, limit: float = LIMIT_S) -> Any:
        """What `condition` gives as soon as it gives something; JavaScript, or a function without arguments."""
        asked = (lambda: self.run(condition)) if isinstance(condition, str) else condition
        late, told = time.monotonic() + limit, "nothing"
        while time.monotonic() < late:
            try:
                if found := asked():
                    return found
            except Exception as error:  # the page is still being made
                told = str(error).splitlines()[0]
            time.sleep(0.1)
        self.keep("missing")
        raise AssertionError(f"waited {limit:.0f} s for {what}; the last answer: {told}")

    def seen(self, element: Any) -> np.ndarray:  # uint8 [H, W, 3]
        """An element of the page, as it is drawn now."""
        return np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB"))

    def keep(self, name: str) -> None:
        """Writes what is visible to VLA_BENCH_SCREENSHOTS, if that names a folder."""
        if folder := os.environ.get("VLA_BENCH_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(f"{folder}/{name}.png")


@pytest.fixture
def window(driver):
    """The browser with an empty page of 1,280 x 900 pixels."""
    driver.get("about:blank")
    window = Window(driver)
    window.size(1280, 900)
    return window


@dataclass
class Lab:
    """A JupyterLab and the folder that it shows."""

    url: str
    root: Path

    def open(self, window: Window, notebook: str) -> None:
        """Opens a notebook by itself, and waits for all of its cells."""
        window.driver.get(f"{self.url}doc/tree/{notebook}")
        ready = "const p = window.jupyterapp?.shell.currentWidget; return p?.context?.isReady && p.content.widgets.length"
        window.wait(ready, f"{notebook} in JupyterLab")

    def run_all(self, window: Window) -> None:
        """Run All, as in the menu; returns when the last cell is done."""
        kernel = "return jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status"
        window.wait(lambda: window.run(kernel) == "idle", "a kernel")
        window.run("jupyterapp.commands.execute('notebook:run-all-cells')")
        counts = f"{CODE} return cells.every(c => c.model.executionCount !== null || failed(c))"
        window.wait(lambda: window.run(counts) and window.run(kernel) == "idle", "the last cell")

    def errors(self, window: Window) -> list[str]:
        """The errors that stand under the cells."""
        found = f"{CODE} return cells.flatMap(c => all(c)).filter(o => o.output_type == 'error').map(o => o.ename + ': ' + o.evalue)"
        return window.run(found)


CODE = """
const all = c => c.model.outputs.toJSON();
const failed = c => all(c).some(o => o.output_type == 'error');
const cells = jupyterapp.shell.currentWidget.content.widgets.filter(
    c => c.model.type == 'code' && c.model.sharedModel.getSource().trim());
"""


@pytest.fixture(scope="session")
def lab(tmp_path_factory, driver):
    """JupyterLab on a free port, with settings, signatures and notebooks of its own."""
    folder = tmp_path_factory.mktemp("lab")
    root = folder / "notebooks"
    root.mkdir()
    news = folder / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # asks nothing, of nobody
    own = {name: str(folder / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    env = os.environ | {f"JUPYTER_{name}_DIR": path for name, path in own.items()}
    env |= {"IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    env |= {"VLA_BENCH_SETTINGS": str(ROOT / "settings.ini"), "MPLBACKEND": ""}
    words = ["--no-browser", "--ip=127.0.0.1", "--port=0", f"--ServerApp.root_dir={root}", "--allow-root"]
    words += ["--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"]
    words += ["--LabApp.extension_manager=readonly", f"--LabApp.user_settings_dir={folder}/settings"]
    words += [f"--LabApp.workspaces_dir={folder}/workspaces"]
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *words],
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield Lab(_address(process, Path(own["RUNTIME"]), folder / "log.txt"), root)
    finally:
        process.terminate()  # it ends its kernels
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _address(process: subprocess.Popen, runtime: Path, log: Path) -> str:
    """Where a JupyterLab that has just been started answers."""
    late = time.monotonic() + LIMIT_S
    while process.poll() is None and time.monotonic() < late:
        for path in runtime.glob("jpserver-*.json"):
            try:
                return json.loads(path.read_text())["url"]
            except ValueError:  # it is being written
                pass
        time.sleep(0.1)
    raise AssertionError(f"JupyterLab did not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def pages(absent, driver):
    """The address of the built documentation."""
    if not (ROOT / "_docs/index.html").is_file():
        absent("the documentation is not built")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words: Any) -> None: ...

    handler = functools.partial(Quiet, directory=ROOT / "_docs")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
