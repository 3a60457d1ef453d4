"""The page in a headless Chromium: masks beyond their boxes."""

import json

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="make test-extras installs playwright")

from sparseinst.serving.answers import answer  # noqa: E402
from tests.extras.browser import center_of, choose, wait_for_objects  # noqa: E402
from tests.serving.service import image_bytes  # noqa: E402


def test_a_mask_is_larger_than_its_box(service, predictor, open_page):
    """YOLACT predicts the box by itself."""
    page, data = open_page(service), image_bytes(seed=1)
    content = answer(predictor, data, threshold=0.5)
    (instance,) = content["instances"]
    x, y, width, height = instance["bbox"]
    instance["bbox"] = [x, y, width / 2, height / 2]
    page.route("**/predict?*", lambda route: route.fulfill(content_type="application/json", body=json.dumps(content)))
    choose(page, data)
    wait_for_objects(page, 1)
    corner = {"bbox": [x + width - 2, y + height - 2, 1, 1]}
    page.mouse.move(*center_of(page, corner, content["image"]))
    playwright.expect(page.locator("#tip")).to_have_text("class 0 90.0%")
