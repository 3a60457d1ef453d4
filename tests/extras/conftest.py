"""A headless Chromium, and a service whose page it opens.

Imports of optional packages are inside the fixtures, because other tests here run without these packages.
"""

import os
import shutil
import subprocess

import pytest

from tests.extras.browser import DESKTOP

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium():
    return next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="make test-extras installs playwright")
    executable = find_chromium()
    if executable is None and shutil.which("apt-get") and os.geteuid() == 0:
        command = ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]
        # Without a timeout: an apt-get that is killed leaves packages half configured.
        subprocess.run(command, capture_output=True)
        executable = find_chromium()
    if executable is None:
        pytest.skip(f"none of {', '.join(NAMES)} is on the PATH, and apt-get cannot install chromium")
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox", *camera])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def predictor():
    from tests.serving.service import stub_predictor

    return stub_predictor()


@pytest.fixture(scope="module")
def service(predictor):
    from sparseinst.serving.limits import Limits
    from tests.serving.service import running

    with running(lambda: predictor, Limits(upload_bytes=200_000)) as client:
        yield client


@pytest.fixture
def open_page(chromium):
    """A function that opens the page of a service; at the end nothing must have failed or come from elsewhere."""
    contexts, requests, errors = [], [], []

    def open_page(client, size=DESKTOP):
        context = chromium.new_context(**size)
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(str(client.base_url))
        page.wait_for_selector("#model:not(:text('Connecting'))")
        origins.add(str(client.base_url).rstrip("/"))
        return page

    origins = {"blob:", "data:"}
    yield open_page
    for context in contexts:
        context.close()
    assert not errors
    assert requests and all(url.startswith(tuple(origins)) for url in requests)
