"""What tests of the page do in the browser."""

DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}


def choose(page, *contents, name="photo.png", kind="image/png"):
    page.set_input_files("#files", [{"name": name, "mimeType": kind, "buffer": content} for content in contents])


def wait_for_objects(page, number):
    # Playwright is in the environment of these tests only.
    from playwright import sync_api

    sync_api.expect(page.locator("#objects button")).to_have_count(number)


def center_of(page, instance, image):
    """The point on the screen of the middle of a box."""
    box = page.locator("#canvas").bounding_box()
    x, y, width, height = instance["bbox"]
    return (
        box["x"] + (x + width / 2) / image["width"] * box["width"],
        box["y"] + (y + height / 2) / image["height"] * box["height"],
    )
