import json
import logging

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

from sparseinst import add_sparse_inst_config, config
from sparseinst.data.coco_json import ClassInfo
from sparseinst.inference import ImageReadError, Predictor, read_image, to_coco_results
from sparseinst.structures.rle_masks import RLEMasks
from tests.red_segmenter import red_segmenter_config

FIELDS = ("pred_masks", "scores", "pred_classes")


def photo(path, height=45, width=70, exif_orientation=None):
    """Smooth colours with a red and a blue block; returns the path."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 2, y * 3, 120 + 0 * x], -1).astype(np.uint8)
    pixels[5:20, 10:30] = (255, 0, 0)
    pixels[25:40, 40:60] = (0, 0, 255)
    exif = Image.Exif()
    if exif_orientation is not None:
        exif[274] = exif_orientation
    Image.fromarray(pixels).save(path, quality=95, exif=exif)
    return path


def tiny_sparse_inst_config(input_format="RGB"):
    cfg = get_cfg()
    add_sparse_inst_config(cfg)
    cfg.merge_from_list(
        "MODEL.META_ARCHITECTURE SparseInst MODEL.DEVICE cpu MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 "
        "MODEL.RESNETS.OUT_FEATURES ['res3','res4','res5'] MODEL.SPARSE_INST.ENCODER.NUM_CHANNELS 16 "
        "MODEL.SPARSE_INST.DECODER.NUM_MASKS 8 MODEL.SPARSE_INST.DECODER.NUM_CLASSES 3 INPUT.MIN_SIZE_TEST 64 "
        "MODEL.SPARSE_INST.DECODER.INST.DIM 16 MODEL.SPARSE_INST.DECODER.MASK.DIM 16 "
        "MODEL.SPARSE_INST.CLS_THRESHOLD 0.0 MODEL.SPARSE_INST.MASK_THRESHOLD 0.3".split()
        + ["INPUT.FORMAT", input_format]
    )
    return cfg


def evaluation_result(model, cfg, path):
    """What the evaluation feeds the model, and what comes out."""
    height, width = read_image(path).shape[:2]
    record = DatasetMapper(cfg, is_train=False)({"file_name": str(path), "height": height, "width": width})
    model.eval()
    with torch.no_grad():
        return record["image"], model([record])[0]["instances"]


def assert_same(instances, expected):
    assert instances.image_size == expected.image_size
    assert torch.equal(instances.pred_boxes.tensor, expected.pred_boxes.tensor)
    for field in FIELDS:
        assert torch.equal(instances.get(field), expected.get(field)), field


@pytest.mark.parametrize("exif_orientation", [None, 3, 6])
@pytest.mark.parametrize("input_format", ["RGB", "BGR"])
def test_results_and_pixels_are_the_evaluations(tmp_path, input_format, exif_orientation):
    path = photo(tmp_path / "a.jpg", exif_orientation=exif_orientation)
    cfg = red_segmenter_config()
    cfg.INPUT.FORMAT = input_format
    model = build_model(cfg)
    tensor, expected = evaluation_result(model, cfg, path)
    predictor = Predictor(cfg, model=model)
    assert len(expected) == 2

    bgr = read_image(path, "BGR")
    rgb = read_image(path, "RGB")
    assert np.array_equal(bgr[:, :, ::-1], rgb)
    for images, order in (([path], "BGR"), ([str(path)], "RGB"), ([bgr], "BGR"), ([rgb], "RGB")):
        assert_same(predictor(images, order)[0], expected)
        handed = model.inputs[0]["image"]
        assert handed.dtype == tensor.dtype == torch.uint8 and torch.equal(handed, tensor)
    # A quarter turn swaps the sides.
    assert expected.image_size == ((70, 45) if exif_orientation == 6 else (45, 70))


@pytest.mark.parametrize("input_format", ["RGB", "BGR"])
def test_sparse_inst_predicts_as_in_the_evaluation(tmp_path, input_format):
    cfg = tiny_sparse_inst_config(input_format)
    torch.manual_seed(0)
    model = build_model(cfg)
    paths = [photo(tmp_path / "a.jpg"), photo(tmp_path / "b.png", height=33, width=31)]
    expected = [evaluation_result(model, cfg, path)[1] for path in paths]
    assert all(len(instances) for instances in expected)
    for instances, reference in zip(Predictor(cfg, model=model)(paths), expected, strict=True):
        assert_same(instances, reference)


def test_red_is_the_models_first_channel_with_rgb(tmp_path):
    Image.new("RGB", (20, 10), (255, 0, 0)).save(tmp_path / "red.png")
    cfg = red_segmenter_config()
    predictor = Predictor(cfg)
    for image in (tmp_path / "red.png", np.full((10, 20, 3), (0, 0, 255), np.uint8)):
        (instances,) = predictor([image])
        assert predictor.model.inputs[0]["image"][:, 0, 0].tolist() == [255, 0, 0]
        assert instances.pred_classes.tolist() == [0] and instances.pred_masks.all()


def test_detectron2s_predictor_agrees(tmp_path):
    # Its resize of the same array is the same; it differs from ours in taking BGR arrays only.
    from detectron2.engine import DefaultPredictor

    cfg = red_segmenter_config()
    image = read_image(photo(tmp_path / "a.png"), "BGR")
    assert_same(Predictor(cfg)([image])[0], DefaultPredictor(cfg)(image)["instances"])


def test_a_given_model_keeps_its_mode_and_inputs_are_unchanged(tmp_path):
    cfg = red_segmenter_config()
    model = build_model(cfg).train()
    image = read_image(photo(tmp_path / "a.png"), "BGR")
    before = image.copy()
    Predictor(cfg, model=model)([image])
    assert model.training
    assert np.array_equal(image, before)


def test_stream_predicts_one_at_a_time(tmp_path):
    predictor = Predictor(red_segmenter_config())
    asked = []

    def images():
        for size in (8, 9):
            asked.append(size)
            yield np.zeros((size, size, 3), np.uint8)

    stream = predictor.stream(images())
    first = next(stream)
    assert asked == [8] and first.image_size == (8, 8) and len(first) == 0
    assert next(stream).image_size == (9, 9)
    assert predictor([]) == []


@pytest.mark.parametrize("content", [b"", b"no picture", "truncated"])
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "broken.jpg"
    if content == "truncated":
        content = photo(path).read_bytes()[:400]
    path.write_bytes(content)
    with pytest.raises(ImageReadError, match="broken.jpg"):
        Predictor(red_segmenter_config())([path])
    with pytest.raises(ImageReadError, match="missing.jpg"):
        read_image(tmp_path / "missing.jpg")
    with pytest.raises(ImageReadError, match=tmp_path.name):
        read_image(tmp_path)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        None,
    ],
)
def test_other_arrays_are_refused(array):
    with pytest.raises(ImageReadError, match="image"):
        Predictor(red_segmenter_config())([array])


def test_wrong_arguments_are_refused(tmp_path):
    predictor = Predictor(red_segmenter_config())
    with pytest.raises(ValueError, match="channel_order.*'rgb'"):
        predictor([], "rgb")
    with pytest.raises(ValueError, match="list"):
        predictor(str(tmp_path / "a.jpg"))
    cfg = red_segmenter_config()
    cfg.INPUT.FORMAT = "L"
    with pytest.raises(ValueError, match="INPUT.FORMAT"):
        Predictor(cfg, model=predictor.model)


def save_checkpoint(cfg, folder, **extra):
    DetectionCheckpointer(build_model(cfg), str(folder)).save("model_final", **extra)
    cfg.MODEL.WEIGHTS = str(folder / "model_final.pth")


def test_class_names_in_order_of_preference(tmp_path):
    cfg = red_segmenter_config()
    assert Predictor(cfg).classes == ClassInfo(["class 0", "class 1"], [0, 1])

    name = "red_segmenter_test_data"
    DatasetCatalog.register(name, list)
    try:
        MetadataCatalog.get(name).set(thing_classes=["red", "blue"], thing_dataset_id_to_contiguous_id={7: 0, 3: 1})
        cfg.DATASETS.TRAIN = (name,)
        cfg.DATASETS.TEST = ("not_registered",)
        assert Predictor(cfg).classes == ClassInfo(["red", "blue"], [7, 3])

        save_checkpoint(cfg, tmp_path)
        assert Predictor(cfg).classes.category_ids == [7, 3]
        ClassInfo(["rot", "blau"], [1, 5]).save(tmp_path / "classes.json")
        assert Predictor(cfg).classes == ClassInfo(["rot", "blau"], [1, 5])
        save_checkpoint(cfg, tmp_path, classes={"names": ["rouge", "bleu"], "category_ids": [2, 4]})
        predictor = Predictor(cfg)
        assert predictor.classes == ClassInfo(["rouge", "bleu"], [2, 4])
        assert predictor.metadata.thing_classes == ["rouge", "bleu"]
        for classes in ([1, 2], {"names": ["a", "b"]}, {"names": [1, 2], "category_ids": [1, 2]}):
            save_checkpoint(cfg, tmp_path, classes=classes)
            with pytest.raises(ValueError, match="The checkpoint .*(list of classes|must be text)"):
                Predictor(cfg)
        save_checkpoint(cfg, tmp_path)

        # COCO's names come without its data.
        cfg.DATASETS.TEST = ("coco_2017_val",)
        cfg.MODEL.SPARSE_INST.DECODER.NUM_CLASSES = 80
        cfg.MODEL.WEIGHTS = ""
        assert Predictor(cfg).classes.names[:2] == ["person", "bicycle"]
        assert Predictor(cfg).classes.category_ids[-1] == 90
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_weights_that_do_not_fit_are_refused(tmp_path, caplog):
    cfg = red_segmenter_config()
    with caplog.at_level(logging.WARNING, "sparseinst"):
        Predictor(cfg)
    assert "RANDOM" in caplog.text

    save_checkpoint(cfg, tmp_path, classes={"names": ["a", "b", "c"], "category_ids": [1, 2, 3]})
    config.mark_explicit(cfg, ["MODEL.SPARSE_INST.DECODER.NUM_CLASSES"])
    with pytest.raises(ValueError, match="NUM_CLASSES is 2, but the checkpoint .* was trained with 3"):
        Predictor(cfg)

    torch.save({"model": {"scores": torch.zeros(5)}}, tmp_path / "other.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="lacks 1 of the model's 1 tensors.*scores"):
        Predictor(cfg)
    cfg.MODEL.WEIGHTS = str(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="MODEL.WEIGHTS.*none.pth"):
        Predictor(cfg)


def test_weights_are_loaded(tmp_path):
    cfg = red_segmenter_config()
    torch.save({"model": {"scores": torch.tensor([0.75, 0.5])}}, tmp_path / "trained.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "trained.pth")
    (instances,) = Predictor(cfg)([photo(tmp_path / "a.png")])
    assert instances.scores.tolist() == [0.75, 0.5]


def test_encoded_masks(tmp_path):
    cfg = tiny_sparse_inst_config()
    torch.manual_seed(0)
    model = build_model(cfg)
    path = photo(tmp_path / "a.jpg")
    (plain,) = Predictor(cfg, model=model)([path])
    cfg.MODEL.OUTPUT.MASK_FORMAT = "rle"
    torch.manual_seed(0)
    (encoded,) = Predictor(cfg, model=build_model(cfg))([path])
    assert isinstance(encoded.pred_masks, RLEMasks)
    assert len(plain) and np.array_equal(np.asarray(encoded.pred_masks), plain.pred_masks.numpy())
    results = [to_coco_results(each, 12, [10, 20, 30]) for each in (plain, encoded)]
    assert results[0] == results[1] == json.loads(json.dumps(results[1]))
    assert to_coco_results(encoded[:0], 12, [10, 20, 30]) == []
    assert encoded.has("pred_masks")


def test_coco_results():
    # By hand: blue at x 2..4, y 1..2 of a 6 x 5 picture, category ids not contiguous.
    image = np.zeros((5, 6, 3), np.uint8)
    image[1:3, 2:5] = (255, 0, 0)
    cfg = red_segmenter_config()
    cfg.INPUT.MIN_SIZE_TEST = 5
    (instances,) = Predictor(cfg)([image])
    (result,) = to_coco_results(instances, 12, [10, 20])
    assert json.loads(json.dumps(result)) == result
    assert result["image_id"] == 12 and result["category_id"] == 20
    assert result["bbox"] == [2, 1, 3, 2] and result["score"] == pytest.approx(0.3)
    assert result["segmentation"]["size"] == [5, 6] and isinstance(result["segmentation"]["counts"], str)
    assert to_coco_results(instances[:0], 12, [10, 20]) == []


def test_the_checkpoint_gives_the_numbers_and_the_names(tmp_path):
    cfg = tiny_sparse_inst_config()
    cfg.MODEL.SPARSE_INST.DECODER.NUM_CLASSES, cfg.MODEL.SPARSE_INST.DECODER.NUM_MASKS = 2, 12
    save_checkpoint(cfg, tmp_path, classes={"names": ["cat", "dog"], "category_ids": [1, 2]})
    other = tiny_sparse_inst_config()
    other.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS
    other.freeze()
    predictor = Predictor(other)
    assert predictor.metadata.thing_classes == ["cat", "dog"]
    (instances,) = predictor([np.zeros((40, 40, 3), np.uint8)])
    assert len(instances) <= 12 and other.MODEL.SPARSE_INST.DECODER.NUM_CLASSES == 3


def test_a_given_models_names_are_drawn(tmp_path):
    cfg = red_segmenter_config()
    name = "red_segmenter_reordered"
    DatasetCatalog.register(name, list)
    try:
        MetadataCatalog.get(name).set(thing_classes=["blue", "red"], thing_dataset_id_to_contiguous_id={7: 0, 3: 1})
        cfg.DATASETS.TEST = (name,)
        model = build_model(cfg)
        model.class_names = ["red", "blue"]
        assert Predictor(cfg, model=model).classes == ClassInfo(["red", "blue"], [3, 7])
        model.class_names = ["rot", "blau"]
        assert Predictor(cfg, model=model).classes.names == ["rot", "blau"]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
