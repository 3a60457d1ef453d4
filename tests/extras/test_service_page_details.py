"""The page in a headless Chromium: masks beyond their boxes, many masks, freed memory, the camera, the focus."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

pytest.importorskip("fastapi", reason="the extra serve is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="make test-extras installs playwright")

from sparseinst.serving.answers import answer  # noqa: E402
from tests.extras.browser import center_of, choose, wait_for_objects  # noqa: E402
from tests.serving.service import image_bytes  # noqa: E402

# The button that has the focus is not covered at its center.
IS_UNCOVERED = """() => {
  const button = document.activeElement;
  const { left, top, width, height } = button.getBoundingClientRect();
  return button.contains(document.elementFromPoint(left + width / 2, top + height / 2));
}"""
SLOW_PERMISSION = """() => {
  const open = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
  Object.assign(window, { streams: [], prompts: [] });
  navigator.mediaDevices.getUserMedia = async (options) => {
    await new Promise((resolve) => window.prompts.push(resolve));
    const stream = await open(options);
    window.streams.push(stream);
    return stream;
  };
}"""
STATES = "streams.map((stream) => stream.getTracks().map((track) => track.readyState).join())"
FOCUS = "document.activeElement.id || document.activeElement.getAttribute('aria-label')"


def choose_crowd(page, predictor, number):
    """Open a photo whose single instance is predicted a number of times."""
    data = image_bytes(seed=1)
    content = answer(predictor, data, threshold=0.5)
    content["instances"] *= number
    page.route("**/predict?*", lambda route: route.fulfill(json=content))
    choose(page, data)
    wait_for_objects(page, number)


def choose_discs(page, number):
    """Open a photo with a number of discs, the largest first; return the photo and their masks."""
    data = image_bytes(height=900, width=1200)
    y, x = np.ogrid[:900, :1200]
    rng = np.random.default_rng(0)
    centers = zip(rng.integers(900, size=number), rng.integers(1200, size=number))
    masks = [(y - cy) ** 2 + (x - cx) ** 2 < (300 - index) ** 2 for index, (cy, cx) in enumerate(centers)]
    instances = []
    for index, mask in enumerate(masks):
        rle = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
        segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
        instance = {"category_id": 1, "category_name": "disc", "score": 0.9, "bbox": [0, 0, 600 - index, 600 - index]}
        instances.append({**instance, "segmentation": segmentation})
    content = {"image": {"height": 900, "width": 1200}, "instances": instances}
    page.route("**/predict?*", lambda route: route.fulfill(json=content))
    choose(page, data)
    wait_for_objects(page, number)
    return data, masks


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


def test_only_the_shown_image_keeps_its_drawing(service, open_page):
    page = open_page(service)
    code = """() => {
      const create = document.createElement.bind(document);
      window.numCanvases = 0;
      document.createElement = (tag) => (tag === "canvas" && window.numCanvases++, create(tag));
    }"""
    page.evaluate(code)
    choose(page, image_bytes(seed=1), image_bytes(seed=2))
    wait_for_objects(page, 1)
    images = page.locator("#strip .open")
    playwright.expect(page.locator("#strip .state").last).to_have_text("1")
    for index in (1, 0, 1):
        page.wait_for_timeout(300)
        before = page.evaluate("numCanvases")
        images.nth(index).click()
        # The canvases of its mask are made anew.
        page.wait_for_function("before => numCanvases > before", arg=before)


def test_a_camera_that_is_closed_before_the_permission_stays_off(service, open_page):
    page = open_page(service)
    page.evaluate(SLOW_PERMISSION)
    page.get_by_role("button", name="Camera").click()
    page.get_by_role("button", name="Close camera").click()
    page.evaluate("prompts.shift()()")
    page.wait_for_function("() => streams.length === 1")
    page.wait_for_timeout(100)
    assert page.evaluate(STATES) == ["ended"] and page.inner_text("#status") == "No image yet."
    # Closed and opened again while the browser asks.
    page.get_by_role("button", name="Camera").click()
    page.get_by_role("button", name="Close camera").click()
    page.get_by_role("button", name="Camera").click()
    page.evaluate("prompts.shift()()")
    page.wait_for_function("() => streams.length === 2")
    page.wait_for_timeout(100)
    assert page.evaluate(STATES) == ["ended", "ended"] and page.locator("#shoot").is_disabled()
    page.evaluate("prompts.shift()()")
    playwright.expect(page.locator("#shoot")).to_be_enabled()
    assert page.evaluate(STATES) == ["ended", "ended", "live"]
    page.get_by_role("button", name="Close camera").click()
    assert page.evaluate(STATES) == ["ended"] * 3


def test_the_focus_moves_on_from_a_button_that_goes(service, predictor, open_page):
    page = open_page(service)
    for name in ("a.png", "b.png"):
        choose(page, image_bytes(), name=name)
        wait_for_objects(page, 1)
    page.get_by_role("button", name="Close a.png").focus()
    page.keyboard.press("Enter")
    assert page.evaluate(FOCUS) == "Close b.png"
    page.keyboard.press("Enter")
    assert page.evaluate(FOCUS) == "choose"

    page.locator("#camera").focus()
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#shoot")).to_be_focused()
    page.keyboard.press("Tab")
    assert page.evaluate(FOCUS) == "stop-camera"
    page.keyboard.press("Enter")
    assert page.evaluate(FOCUS) == "camera"

    predictor.model.error = RuntimeError("no memory")
    choose(page, image_bytes(), name="c.png")
    page.get_by_role("button", name="Try again").focus()
    predictor.model.error = None
    page.keyboard.press("Enter")
    assert page.evaluate(FOCUS) == "objects-heading"
    wait_for_objects(page, 1)


def test_a_converted_image_has_nothing_drawn_on_it(service, open_page):
    page = open_page(service)
    with page.expect_request("**/draw?instances=false"):
        choose(page, image_bytes("TIFF"), name="scan.tif", kind="image/tiff")
    wait_for_objects(page, 1)


@pytest.mark.parametrize("width, height", [(390, 844), (844, 390), (320, 256)])
def test_the_stage_does_not_cover_the_focus(service, predictor, open_page, width, height):
    page = open_page(service, {"viewport": {"width": width, "height": height}})
    choose_crowd(page, predictor, 40)
    page.locator("#save-image").focus()
    for number in range(39, -1, -1):
        page.keyboard.press("Shift+Tab")
        assert page.evaluate("document.activeElement.dataset.rank") == str(number)
        assert page.evaluate(IS_UNCOVERED), f"object {number}"


def test_a_service_that_stops_while_the_page_opens(service, chromium):
    page, errors, requests = chromium.new_page(), [], []
    page.on("pageerror", lambda error: errors.append(str(error)))

    def abort_first(route):
        requests.append(route.request.url)
        route.abort() if len(requests) == 1 else route.continue_()

    page.route("**/metadata", abort_first)
    page.goto(str(service.base_url))
    playwright.expect(page.get_by_role("alert")).to_contain_text("The service cannot be reached")
    playwright.expect(page.locator("#model")).to_contain_text("2 classes")
    playwright.expect(page.locator("#banner")).to_be_hidden()
    page.close()
    assert not errors and len(requests) == 2


def test_a_crowd_has_a_box_and_a_name_for_the_chosen_object_only(service, predictor, open_page):
    page = open_page(service)
    # The calls of the drawing, in place of its pixels.
    page.evaluate("""() => {
      const { prototype } = CanvasRenderingContext2D;
      const { strokeRect, fillText } = prototype;
      const note = (name, call) => function (...args) { drawn.push(name); call.apply(this, args); };
      window.drawn = [];
      Object.assign(prototype, { strokeRect: note("box", strokeRect), fillText: note("name", fillText) });
    }""")

    def drawn():
        page.wait_for_timeout(200)
        page.evaluate("drawn.length = 0")
        # The page draws again.
        page.locator("#show-masks").click(force=True)
        page.wait_for_timeout(200)
        return page.evaluate("drawn")

    choose_crowd(page, predictor, 41)
    hint = page.locator("#crowded")
    playwright.expect(hint).to_have_text("Boxes and names appear for 40 objects or fewer, and for the one you choose.")
    assert drawn() == []
    page.locator("#objects button").first.click()
    assert drawn() == ["box", "name"]
    page.unroute("**/predict?*")
    choose_crowd(page, predictor, 40)
    playwright.expect(hint).to_be_hidden()
    assert sorted(drawn()) == ["box"] * 40 + ["name"] * 40


def test_many_masks_take_one_canvas_each_and_none_after_a_download(service, open_page):
    page = open_page(service)
    page.evaluate("""() => {
      const create = document.createElement.bind(document);
      window.canvases = [];
      document.createElement = (tag) => {
        const element = create(tag);
        if (tag === "canvas") canvases.push(element);
        return element;
      };
    }""")
    number = "() => canvases.filter(({ width }) => width > 0).length"
    choose_discs(page, 100)
    page.wait_for_function("() => canvases.length >= 100")
    page.wait_for_timeout(300)
    assert page.evaluate("canvases.length") == page.evaluate(number) == 100
    with page.expect_download():
        page.get_by_role("button", name="Drawn image").click()
    # The drawn image has a canvas, too.
    assert page.evaluate(number) == 101


def test_masks_appear_over_several_calls(service, open_page):
    page = open_page(service)
    rle = mask_api.encode(np.ones((900, 1200), np.uint8, order="F"))
    segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
    code = """async (segmentation) => {
      const { Drawing } = await import("/drawing.js");
      const canvas = document.createElement("canvas");
      const instance = { segmentation, bbox: [0, 0, 1200, 900] };
      const prediction = { image: { width: 1200, height: 900 }, instances: [instance, instance, instance] };
      const drawing = new Drawing(canvas, prediction, ["#ff0000"], 1200);
      const view = { instances: drawing.instances, show: { masks: true } };
      const draw = (options) => drawing.draw(canvas, { ...view, ...options });
      const calls = [1, 2, 3, 4].map(() => [draw({ milliseconds: 1e-6 }), drawing.masks.size]);
      drawing.masks.clear();
      return [...calls, [draw(), drawing.masks.size]];
    }"""
    # Without a limit of time, all are drawn and none is cached.
    assert page.evaluate(code, segmentation) == [[False, 1], [False, 2], [True, 3], [True, 3], [True, 0]]


def test_the_drawn_masks_of_a_download(service, open_page):
    page = open_page(service)
    data, masks = choose_discs(page, 3)
    for name in ("Boxes", "Names"):
        page.get_by_label(name).uncheck(force=True)
    with page.expect_download() as download:
        page.get_by_role("button", name="Drawn image").click()
    drawn = np.asarray(Image.open(download.value.path()).convert("RGB"))
    expected = np.asarray(Image.open(io.BytesIO(data))).astype(float)
    palette = service.get("/metadata").json()["palette"]
    for mask, color in zip(masks, palette):
        # The window of the mask ends at the edge of the image: the outline goes along it.
        padded = np.pad(mask, 3)
        inner = mask & padded[6:, 3:-3] & padded[:-6, 3:-3] & padded[3:-3, 6:] & padded[3:-3, :-6]
        opacity = np.where(inner, 0.42, 1.0)[..., None] * mask[..., None]
        color = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
        expected = (1 - opacity) * expected + opacity * color
    assert drawn.shape == expected.shape and np.abs(drawn - expected).max() < 4
