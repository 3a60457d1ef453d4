"""Take the pictures of docs/serving.md: the page with a trained model, on a desk and on a phone.

python -m tests.extras.screenshots output/quick/model_final.pth datasets/shapes/val docs/images
"""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from sparseinst.serving.limits import Limits
from sparseinst.tools.serve_run import predictor_loader
from tests.extras.browser import DESKTOP, PHONE
from tests.extras.conftest import find_chromium
from tests.serving.service import running

FIRST, NUM_IMAGES = 22, 6


def main(weights: str, images: str, output: str) -> None:
    """Save serving.jpg and serving_phone.jpg in a folder."""
    load = predictor_loader(weights, None, [])
    files = sorted(map(str, Path(images).iterdir()))[FIRST : FIRST + NUM_IMAGES]
    with running(load, Limits(), file=Path(weights).name) as client, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        for name, size in (("serving", DESKTOP), ("serving_phone", PHONE)):
            page = browser.new_context(**size).new_page()
            page.goto(str(client.base_url))
            page.set_input_files("#files", files)
            page.wait_for_selector(f"#strip > :nth-child({NUM_IMAGES})")
            page.wait_for_timeout(5_000)
            page.locator("#strip .open").first.click()
            page.wait_for_selector("#objects button")
            if size is PHONE:
                page.locator("label", has_text="Activation maps").click()
                page.locator("#objects button").first.click()
            page.wait_for_timeout(1_000)
            page.screenshot(path=Path(output) / f"{name}.jpg", type="jpeg", quality=85)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
