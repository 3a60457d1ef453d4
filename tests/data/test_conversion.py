"""Convert whole folders of annotations: their format, their images, and annotations that must be refused."""

import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sparseinst.data.conversion import convert

SQUARE = [[2, 3], [12, 3], [12, 13], [2, 13]]  # 10 x 10 pixels
YOLO_SQUARE = ".05 .15 .3 .15 .3 .65 .05 .65"  # in an image of 20 x 40 pixels


def save(path, content=""):
    """Write a file below new folders: an array as an image, text, or an object as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        Image.fromarray(content).save(path)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def photos(folder, *names, size=(20, 40)):
    """Save noise of a size (height, width), which no mask resembles, under these names."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    for name in names:
        save(folder / name, pixels)


def labelme(image, label="cat", points=SQUARE, **others):
    return {"imagePath": image, "shapes": [{"label": label, "points": points}], **others}


def objects(content):
    """Return (image, class, area) of each object."""
    files = {image["id"]: image["file_name"] for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    return [(files[a["image_id"]], names[a["category_id"]], a["area"]) for a in content["annotations"]]


@pytest.fixture
def many(tmp_path):
    """Return a folder with 150 photographs in images/train/."""
    photos(tmp_path / "images" / "train", *(f"{number:03}.jpg" for number in range(150)))
    return tmp_path


@pytest.mark.parametrize("source", ["", "images"])
def test_few_labelme_files_among_many_photographs(source, many):
    folder = many / source
    save(folder / "a.json", {"images": [], "annotations": []})
    save(folder / "b" / "120.json", labelme("../images/120.jpg" if source == "" else "../120.jpg"))
    assert objects(convert(folder, many / "images")) == [("train/120.jpg", "cat", 100)]


def test_the_size_of_labelme(tmp_path):
    photos(tmp_path, "a.jpg")
    for declared in ({"imageHeight": 20, "imageWidth": 40}, {"imageHeight": None, "imageWidth": None}):
        save(tmp_path / "a.json", labelme("a.jpg", **declared))
        assert objects(convert(tmp_path, tmp_path)) == [("a.jpg", "cat", 100)]
    save(tmp_path / "a.json", labelme("a.jpg", imageHeight=80, imageWidth=160))
    with pytest.raises(ValueError, match=r"a.json: .*\(80, 160\), but .*a.jpg has \(20, 40\): give the images"):
        convert(tmp_path, tmp_path)


def test_labelme_declares_the_size_of_the_rotated_image(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # stored as 20 x 40, shown as 40 x 20
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    save(tmp_path / "a.json", labelme("a.jpg", imageHeight=40, imageWidth=20))
    assert objects(convert(tmp_path, tmp_path)) == [("a.jpg", "cat", 100)]
    save(tmp_path / "a.json", labelme("a.jpg", imageHeight=20, imageWidth=40))
    with pytest.raises(ValueError, match=r"\(20, 40\), but .* \(40, 20\) .*may ignore EXIF"):
        convert(tmp_path, tmp_path)


@pytest.mark.parametrize("folder", ["labels/train", "images/train"])
def test_yolo_labels_among_many_photographs(folder, many):
    for number in range(150):  # the first images have no objects
        save(many / folder / f"{number:03}.txt", f"0 {YOLO_SQUARE}" if number == 149 else "")
    assert objects(convert(many, many / "images")) == [("train/149.jpg", "class 0", 100)]


@pytest.mark.parametrize("source", ["", "images"])
def test_photographs_without_annotations_are_refused(source, many):
    save(many / "images" / "other.json", {"objects": []})
    with pytest.raises(ValueError, match="train/000.jpg: the file is one of the images .* no labelme, VIA or YOLO"):
        convert(many / source, many / "images")


@pytest.mark.parametrize(
    ("names", "number", "expected", "category_id"),
    [
        ("{1: dog, 0: cat}", 0, "cat", 1),
        ("{1: dog, 0: cat}", 1, "dog", 2),
        ("{1: cat, 2: dog}", 1, "cat", 1),
        ("{'10': cat, '2': dog}", 10, "cat", 2),
        ("[cat, dog]", 1, "dog", 2),
    ],
)
def test_the_keys_of_yolo_classes(names, number, expected, category_id, tmp_path):
    photos(tmp_path / "images", "a.jpg")
    save(tmp_path / "labels" / "a.txt", f"{number} {YOLO_SQUARE}")
    save(tmp_path / "data.yaml", f"names: {names}")
    content = convert(tmp_path / "labels", tmp_path / "images")
    assert objects(content) == [("a.jpg", expected, 100)]
    assert content["annotations"][0]["category_id"] == category_id and len(content["categories"]) == 2


@pytest.mark.parametrize(
    ("line", "names", "message"),
    [
        (f"-1 {YOLO_SQUARE}", "[cat, dog]", "line 3: class -1; expected one of {0: 'cat', 1: 'dog'}"),
        (f"-1 {YOLO_SQUARE}", None, "line 3: class -1; expected 0 or more"),
        (f"2 {YOLO_SQUARE}", "[cat, dog]", "line 3: class 2; expected one of"),
        (f"0 {YOLO_SQUARE}", "{1: cat, 2: dog}", "line 3: class 0; expected one of {1: 'cat', 2: 'dog'}"),
        (f"cat {YOLO_SQUARE}", "[cat, dog]", "line 3: invalid literal for int.*'cat'; expected the number"),
        ("1 .1 .1 .1 .2 x .2", "[cat, dog]", "line 3: could not convert string to float: 'x'"),
        (f"0 {YOLO_SQUARE}", "{a: cat}", "data.yaml has names with a key that is not a number.*'a'"),
    ],
)
def test_lines_of_yolo_that_are_refused(line, names, message, tmp_path):
    photos(tmp_path / "images", "a.jpg")
    save(tmp_path / "labels" / "a.txt", f"1 {YOLO_SQUARE}\n\n{line}")
    if names is not None:
        save(tmp_path / "data.yaml", f"names: {names}")
    with pytest.raises(ValueError, match=message) as error:
        convert(tmp_path / "labels", tmp_path / "images")
    assert "a.txt: line" in str(error.value) or "data.yaml" in str(error.value)


def test_text_files_without_an_image(tmp_path):
    photos(tmp_path, "val.jpg", "train.jpg")
    save(tmp_path / "val.txt", f"\n0 {YOLO_SQUARE}")
    save(tmp_path / "train.txt")
    for name, text in (("classes", "cat\ndog"), ("test", "images/val.jpg"), ("README.dataset", "4 classes 1 2 3")):
        save(tmp_path / f"{name}.txt", text)
    assert objects(convert(tmp_path, tmp_path)) == [("val.jpg", "class 0", 100)]
    for line in (f"0 {YOLO_SQUARE}", f"cat {YOLO_SQUARE}", f"-1 {YOLO_SQUARE}"):
        save(tmp_path / "test.txt", line)
        with pytest.raises(ValueError, match="test.txt: the folder .* has no image 'test'"):
            convert(tmp_path, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e8, 1e9, 10**400])
@pytest.mark.parametrize("kind", ["labelme", "VIA", "YOLO"])
def test_coordinates_that_pycocotools_cannot_draw(kind, value, tmp_path):
    photos(tmp_path, "a.jpg")
    file = tmp_path / ("a.txt" if kind == "YOLO" else "a.json")
    if kind == "labelme":
        save(file, labelme("a.jpg", points=[*SQUARE, [20, value]]))
    elif kind == "VIA":
        content = via(a=["cat"])
        content["_via_img_metadata"]["a.jpg1"]["regions"][0]["shape_attributes"]["all_points_x"][0] = value
        save(file, content)
    else:
        save(file, f"0 {YOLO_SQUARE} {value} .5")
    with pytest.raises(ValueError, match="polygon coordinate|int too large") as error:
        convert(tmp_path, tmp_path)
    assert str(error.value).startswith(str(file))


def square_mask(value=1):
    mask = np.zeros((20, 40), np.uint8)
    mask[3:13, 2:12] = value
    return mask


def test_masks_in_a_subfolder_of_the_images(tmp_path):
    photos(tmp_path, "a.jpg", "b/c.jpg")
    save(tmp_path / "masks" / "a.png", square_mask())
    content = convert(tmp_path / "masks", tmp_path)
    assert objects(content) == [("a.jpg", "object", 100)]
    assert [image["file_name"] for image in content["images"]] == ["a.jpg", "b/c.jpg"]


def test_a_mask_with_a_smoothed_edge(tmp_path):
    photos(tmp_path / "images", "a.jpg")
    smoothed = Image.fromarray(square_mask(255)).filter(ImageFilter.GaussianBlur(1))
    save(tmp_path / "masks" / "a.png", np.array(smoothed))
    with pytest.raises(ValueError, match="masks/a.png: .* values above 0 form edges only.*: threshold the mask"):
        convert(tmp_path / "masks", tmp_path / "images")


def test_masks_next_to_an_unknown_json(tmp_path):
    photos(tmp_path / "images", "a.jpg")
    save(tmp_path / "masks" / "a.png", square_mask())
    save(tmp_path / "masks" / "info.json", {"tool": "GIMP"})
    assert objects(convert(tmp_path / "masks", tmp_path / "images")) == [("a.jpg", "object", 100)]


def via(**labels_of_images):
    xs, ys = map(list, zip(*SQUARE))
    shape = {"name": "polygon", "all_points_x": xs, "all_points_y": ys}
    regions = {
        image: [{"shape_attributes": shape, "region_attributes": {"class": label}} for label in labels]
        for image, labels in labels_of_images.items()
    }
    entries = {f"{image}.jpg1": {"filename": f"{image}.jpg", "regions": found} for image, found in regions.items()}
    return {"_via_settings": {}, "_via_img_metadata": entries}


def test_via_projects_of_several_annotators(tmp_path):
    photos(tmp_path / "images", "a.jpg", "b.jpg")
    projects = tmp_path / "projects"
    save(projects / "a.json", {"images": [], "annotations": []})
    save(projects / "anna.json", via(a=["cat"], b=[]))
    save(projects / "ben" / "project.json", via(a=[], b=["dog", "cat"]))
    assert objects(convert(projects, tmp_path / "images")) == [
        ("a.jpg", "cat", 100), ("b.jpg", "dog", 100), ("b.jpg", "cat", 100),
    ]  # fmt: skip
    # A second version of the same regions would double them.
    save(projects / "backup.json", via(a=["cat"], b=[]))
    with pytest.raises(ValueError, match="backup.json: .*a.jpg has objects in .*anna.json too"):
        convert(projects, tmp_path / "images")
    assert len(objects(convert(projects / "backup.json", tmp_path / "images"))) == 1


@pytest.mark.parametrize(
    ("file", "content"),
    [("a.json", labelme("a.jpg")), ("a.txt", f"0 {YOLO_SQUARE}"), ("a.png", square_mask())],
)
def test_a_copy_of_annotations_would_double_the_objects(file, content, tmp_path):
    photos(tmp_path / "images", "a.jpg", "old/b.jpg")
    save(tmp_path / "labels" / file, content)
    assert len(convert(tmp_path / "labels", tmp_path / "images")["annotations"]) == 1
    save(tmp_path / "labels" / "old" / file, content)
    with pytest.raises(ValueError, match=f"old.{file}: .*a.jpg has objects in .*labels.{file} too.*: remove one file"):
        convert(tmp_path / "labels", tmp_path / "images")


@pytest.mark.parametrize("label", [None, "", " "])
def test_labels_without_a_name_are_refused(label, tmp_path):
    photos(tmp_path, "a.jpg")
    content = labelme("a.jpg")
    content["shapes"].append({**content["shapes"][0], "label": label})
    save(tmp_path / "a.json", content)
    with pytest.raises(ValueError, match="a.json: an object of .*a.jpg has the label .*; expected the name"):
        convert(tmp_path, tmp_path)
    save(tmp_path / "a.json", via(a=["cat", label]))
    with pytest.raises(ValueError, match="a.json: an object of .*a.jpg has the label ' ?'; expected the name"):
        convert(tmp_path, tmp_path)


def test_a_mask_file_of_an_occluded_object(tmp_path):
    photos(tmp_path / "images", "a.jpg")
    parts = square_mask()
    parts[3:13, 5:8] = 0
    save(tmp_path / "masks" / "a_1.png", parts)
    assert len(convert(tmp_path / "masks", tmp_path / "images")["annotations"]) == 2
    assert objects(convert(tmp_path / "masks", tmp_path / "images", values="files")) == [("a.jpg", "object", 70)]


def test_masks_of_one_name_in_several_folders(tmp_path):
    photos(tmp_path / "images", "a.jpg")
    save(tmp_path / "masks" / "cat" / "a.png", square_mask())
    save(tmp_path / "masks" / "dog" / "a.png", np.roll(square_mask(), 20, axis=1))
    assert len(convert(tmp_path / "masks", tmp_path / "images")["annotations"]) == 2
