"""The page of the service in a headless Chromium: ``make test-extras``."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

pytest.importorskip("fastapi", reason="the extra serve is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="make test-extras installs playwright")

from sparseinst.inference import Predictor  # noqa: E402
from sparseinst.serving.answers import answer  # noqa: E402
from sparseinst.serving.limits import Limits  # noqa: E402
from tests.extras.browser import DESKTOP, PHONE, center_of, choose, wait_for_objects  # noqa: E402
from tests.serving.service import image_bytes, metric, running, stub_predictor  # noqa: E402
from tests.tiny_model import tiny_cfg, tiny_model  # noqa: E402


def test_masks_are_decoded_as_pycocotools_decodes_them(service, open_page):
    page = open_page(service)
    rng = np.random.default_rng(0)
    cases = []
    for height, width, share in ((1, 1, 1.0), (7, 5, 0.5), (40, 61, 0.03), (64, 48, 0.97), (300, 200, 0.5)):
        mask = np.asfortranarray(rng.random((height, width)) < share, dtype=np.uint8)
        # Long runs, whose differences are negative.
        mask[: height // 3] = 1
        rle = mask_api.encode(mask)
        cases.append(({"size": rle["size"], "counts": rle["counts"].decode()}, mask))
    code = """async ([rle, scale]) => {
      const { area, covers, decodeMask, parseCounts } = await import("/rle.js");
      const mask = decodeMask(rle, scale);
      const counts = parseCounts(rle.counts);
      const [rows, columns] = rle.size.map((length) => [...Array(length + 2).keys()].map((index) => index - 1));
      const covered = rows.map((row) => columns.map((column) => covers(counts, rle.size[0], column, row)));
      return { ...mask, pixels: [...mask.pixels], area: area(counts), covered };
    }"""
    for rle, mask in cases:
        found = page.evaluate(code, [rle, 1])
        whole = np.zeros_like(mask)
        rows, columns = slice(found["top"], None), slice(found["left"], None)
        window = np.reshape(found["pixels"], (found["height"], found["width"]))
        whole[rows, columns][: found["height"], : found["width"]] = window
        assert np.array_equal(whole, mask) and found["area"] == mask.sum()
        # Also just outside of the image.
        assert np.array_equal(found["covered"], np.pad(mask, 1))
        # Reduced: the pixels at the centers of the larger ones.
        found = page.evaluate(code, [rle, 0.5])
        expected = mask[1::2, 1::2] if min(mask.shape) > 1 else mask[:0, :0]
        window = np.reshape(found["pixels"], (found["height"], found["width"]))
        top, left = found["top"], found["left"]
        assert np.array_equal(window, expected[top : top + found["height"], left : left + found["width"]])
        assert window.sum() == expected.sum()


def test_objects_are_shown_and_hidden_without_a_new_prediction(service, predictor, open_page):
    page, data = open_page(service), image_bytes(seed=1)
    before = metric(service, "sparseinst_requests_total", endpoint="predict", status=200)
    choose(page, data)
    wait_for_objects(page, 1)
    assert page.inner_text("#status") == "photo.png: 1 object: 1 class 0"
    assert page.inner_text("#hidden-count") == "1 more below it"
    page.get_by_role("slider", name="Least score").fill("0.2")
    wait_for_objects(page, 2)
    rows = [row.split("\n") for row in page.locator("#objects button").all_inner_texts()]
    assert rows == [["class 0", "90%"], ["class 1", "30%"]]
    page.get_by_role("checkbox", name="class 0").uncheck(force=True)
    wait_for_objects(page, 1)
    assert "1 object: 1 class 1" in page.locator("#canvas").get_attribute("aria-label")
    page.get_by_role("checkbox", name="class 0").check(force=True)
    wait_for_objects(page, 2)
    assert metric(service, "sparseinst_requests_total", endpoint="predict", status=200) == before + 1


def test_pixels_pointer_and_keyboard(service, predictor, open_page):
    page, data = open_page(service), image_bytes(seed=1)
    choose(page, data)
    wait_for_objects(page, 1)
    assert all(page.get_by_label(name).is_checked() for name in ("Masks", "Boxes", "Names"))
    content = answer(predictor, data, threshold=0.0)
    red, blue = content["instances"]
    code = """([x, y]) => {
      const canvas = document.getElementById("canvas");
      const [width, height] = [canvas.width, canvas.height];
      return [...canvas.getContext("2d").getImageData(Math.round(x * width), Math.round(y * height), 1, 1).data];
    }"""

    def color_of(instance):
        x, y, width, height = instance["bbox"]
        size = content["image"]
        page.wait_for_timeout(100)
        return page.evaluate(code, [(x + width / 2) / size["width"], (y + height / 2) / size["height"]])

    # 42 % of the first color of the palette over red; the blue block is below the threshold.
    expected = [0.58 * level + 0.42 * tint for level, tint in zip((255, 0, 0), (0x2B, 0xFF, 0x26))]
    assert np.abs(np.subtract(color_of(red)[:3], expected)).max() < 4
    assert np.abs(np.subtract(color_of(blue), (0, 0, 255, 255))).max() < 4
    page.get_by_label("Masks").uncheck(force=True)
    assert np.abs(np.subtract(color_of(red), (255, 0, 0, 255))).max() < 4
    page.get_by_label("Masks").check(force=True)
    page.mouse.move(*center_of(page, red, content["image"]))
    playwright.expect(page.locator("#tip")).to_have_text("class 0 90.0%")
    page.mouse.click(*center_of(page, red, content["image"]))
    button = page.locator("#objects button")
    playwright.expect(button).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Escape")
    playwright.expect(button).to_have_attribute("aria-pressed", "false")
    page.mouse.move(*center_of(page, blue, content["image"]))
    playwright.expect(page.locator("#tip")).to_be_hidden()
    button.focus()
    page.keyboard.press("Enter")
    playwright.expect(button).to_have_attribute("aria-pressed", "true")


def test_everything_has_a_name_and_is_reached_by_the_keyboard(service, open_page):
    page = open_page(service)
    choose(page, image_bytes(), image_bytes(seed=2))
    wait_for_objects(page, 1)
    controls = page.locator("button:visible, input:not([hidden]), a")
    for index in range(controls.count()):
        name = controls.nth(index).evaluate(
            "e => e.getAttribute('aria-label') || e.innerText || [...(e.labels ?? [])].map(l => l.innerText).join(' ')"
        )
        assert name.strip(), controls.nth(index).evaluate("e => e.outerHTML")
    assert page.locator("[role=status][aria-live=polite]").inner_text()
    reached = set()
    page.locator("body").press("Tab")
    for _ in range(30):
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
        page.keyboard.press("Tab")
    assert {"choose", "camera", "open", "remove", "threshold", "show-masks", "save-json", "save-image"} <= reached
    # Contrast of texts and their ground, by WCAG: 4.5 at least.
    code = """() => {
      const luminance = (color) => {
        const parts = color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
        const linear = parts.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
      };
      const ground = (element) => {
        const color = getComputedStyle(element).backgroundColor;
        return color === "rgba(0, 0, 0, 0)" ? ground(element.parentElement) : color;
      };
      return [".hint", ".model", ".status", "#choose", "#camera", "nav a", ".switch span", "legend"].map((selector) => {
        const element = [...document.querySelectorAll(selector)].find((e) => e.offsetParent && e.innerText);
        const [a, b] = [luminance(getComputedStyle(element).color), luminance(ground(element))];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      });
    }"""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert min(page.evaluate(code)) >= 4.5


def test_images_come_by_drop_paste_and_camera(service, open_page):
    page = open_page(service)
    code = """([name, bytes]) => {
      const files = new DataTransfer();
      files.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
      const kind = name === "paste" ? ClipboardEvent : DragEvent;
      const key = name === "paste" ? "clipboardData" : "dataTransfer";
      document.body.dispatchEvent(new kind(name, { [key]: files, bubbles: true, cancelable: true }));
    }"""
    for number, name in enumerate(("drop", "paste"), 1):
        page.evaluate(code, [name, list(image_bytes(seed=number))])
        playwright.expect(page.locator("#strip li")).to_have_count(number)
        wait_for_objects(page, 1)
    page.get_by_role("button", name="Camera").click()
    playwright.expect(page.locator("#video")).to_be_visible()
    page.get_by_role("button", name="Take photo").click()
    playwright.expect(page.locator("#strip li")).to_have_count(3)
    playwright.expect(page.locator("#video")).to_be_hidden()
    playwright.expect(page.locator("#status")).to_contain_text("photo ")
    page.get_by_role("button", name="Close photo").click()
    playwright.expect(page.locator("#strip li")).to_have_count(2)


def test_downloads_hold_what_is_shown(service, predictor, open_page, tmp_path):
    page, images = open_page(service), [image_bytes(seed=1), image_bytes(seed=2, height=50)]
    choose(page, *images)
    wait_for_objects(page, 1)
    playwright.expect(page.locator("#strip .state").last).to_have_text("1")
    with page.expect_download() as download:
        page.get_by_role("button", name="COCO JSON").click()
    download.value.save_as(tmp_path / "objects.json")
    coco = COCO(tmp_path / "objects.json")
    assert [coco.imgs[1]["height"], coco.imgs[2]["height"]] == [45, 50] and len(coco.cats) == 2
    for image_id, data in enumerate(images, 1):
        (expected,) = answer(predictor, data, threshold=0.5, image_id=image_id)["instances"]
        (found,) = coco.imgToAnns[image_id]
        assert {key: found[key] for key in ("category_id", "bbox", "score", "segmentation")} == {
            key: expected[key] for key in ("category_id", "bbox", "score", "segmentation")
        }
        assert found["area"] == coco.annToMask(found).sum() > 0
    with page.expect_download() as download:
        page.get_by_role("button", name="Drawn image").click()
    drawn = Image.open(download.value.path())
    assert download.value.suggested_filename == "photo_objects.png" and drawn.size == (1024, 658)


def test_activation_maps(open_page):
    opts = ("MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0)
    predictor = Predictor(tiny_cfg(*opts), model=tiny_model(*opts))
    with running(lambda: predictor) as client:
        page = open_page(client)
        page.get_by_role("slider", name="Least score").fill("0.05")
        choose(page, image_bytes(height=60, width=90))
        page.wait_for_selector("#objects button")
        before = page.locator("#canvas").screenshot()
        page.get_by_label("Activation maps").check(force=True)
        playwright.expect(page.get_by_role("radio")).to_have_count(2)
        page.wait_for_timeout(300)
        first = page.locator("#canvas").screenshot()
        page.get_by_role("radio", name="Map 2").check(force=True)
        page.wait_for_timeout(300)
        assert len({before, first, page.locator("#canvas").screenshot()}) == 3


def test_an_error_of_activation_maps_stays(open_page):
    opts = ("MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0)
    predictor = Predictor(tiny_cfg(*opts), model=tiny_model(*opts))
    with running(lambda: predictor) as client:
        page = open_page(client)
        choose(page, image_bytes(height=60, width=90))
        playwright.expect(page.locator("#status")).to_contain_text("object")
        answer = {"status": 500, "content_type": "application/json", "body": '{"error": "no memory for maps"}'}
        page.route("**/predict?*maps=true*", lambda route: route.fulfill(**answer))
        page.get_by_label("Activation maps").check(force=True)
        playwright.expect(page.locator("#status")).to_have_text("no memory for maps")
        page.wait_for_timeout(300)
        playwright.expect(page.locator("#status")).to_have_text("no memory for maps")
        assert not page.locator("#show-maps").is_checked()


def test_a_prediction_that_is_too_slow_is_not_repeated(open_page):
    predictor = stub_predictor()
    with running(lambda: predictor, Limits(seconds=0.5)) as client:
        page = open_page(client)
        before = predictor.model.num_started
        predictor.model.gate.clear()
        choose(page, image_bytes())
        playwright.expect(page.locator("#failure-text")).to_contain_text("the prediction is too slow")
        assert predictor.model.num_started == before + 1
        predictor.model.gate.set()
        page.get_by_role("button", name="Try again").click()
        wait_for_objects(page, 1)


def test_formats_that_the_browser_does_not_read(service, open_page):
    page = open_page(service)
    choose(page, image_bytes("TIFF", seed=1), name="scan.tif", kind="image/tiff")
    wait_for_objects(page, 1)
    assert page.locator("#canvas").is_visible()
    playwright.expect(page.locator("#failure")).to_be_hidden()


def test_errors_are_shown_and_the_page_goes_on(service, predictor, open_page):
    page = open_page(service)
    choose(page, b"text", name="a.png")
    playwright.expect(page.locator("#failure-text")).to_contain_text("not an image")
    choose(page, bytes(300_000), name="b.png")
    playwright.expect(page.locator("#failure-text")).to_contain_text("larger than 200000 bytes")
    predictor.model.error = RuntimeError("no memory")
    choose(page, image_bytes(), name="c.png")
    playwright.expect(page.locator("#failure-text")).to_contain_text("The inference failed")
    predictor.model.error = None
    page.get_by_role("button", name="Try again").click()
    wait_for_objects(page, 1)
    playwright.expect(page.locator("#failure")).to_be_hidden()


def test_a_model_that_cannot_be_loaded(chromium):
    def load():
        raise ValueError("model.pth is damaged")

    with running(load) as client:
        page = chromium.new_page()
        page.goto(str(client.base_url))
        playwright.expect(page.get_by_role("alert")).to_have_text("The model cannot be loaded: model.pth is damaged")
        page.close()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_fits_the_screen(service, open_page, size):
    page = open_page(service, size)
    choose(page, image_bytes(height=400, width=600), image_bytes(height=600, width=300))
    wait_for_objects(page, 1)
    code = "() => [document.documentElement.scrollWidth, innerWidth]"
    for _ in range(2):
        width, screen = page.evaluate(code)
        assert width <= screen
        box, stage = page.locator("#canvas").bounding_box(), page.locator("#stage").bounding_box()
        assert stage["x"] - 1 <= box["x"] and box["x"] + box["width"] <= stage["x"] + stage["width"] + 1
        assert stage["y"] - 1 <= box["y"] and box["y"] + box["height"] <= stage["y"] + stage["height"] + 1
        page.locator("#strip .open").last.click()
        page.wait_for_timeout(200)
    heights = page.locator("button:visible:not(.remove), .switch:visible").evaluate_all(
        "all => all.map(e => e.offsetHeight)"
    )
    assert min(heights) >= 36


def test_the_list_of_endpoints(service, open_page):
    page = open_page(service)
    page.get_by_role("link", name="API").click()
    playwright.expect(page.locator("#endpoints h2").first).to_contain_text("/predict")
    assert "threshold" in page.inner_text("#endpoints")
    assert page.locator("#endpoints .method").all_inner_texts() == ["POST", "POST", "GET", "GET", "GET"]
    assert page.inner_text("#example").startswith("curl -F image=@photo.jpg 'http://127.0.0.1:")
