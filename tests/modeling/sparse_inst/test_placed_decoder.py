"""Maps at the peaks of a heat map: masks and losses by hand, the model."""

import copy
import math

import pytest
import torch
from detectron2.structures import BitMasks

from sparseinst.modeling.sparse_inst import placed_decoder
from sparseinst.modeling.sparse_inst import placed_masks as placed_masks_module
from sparseinst.modeling.sparse_inst.decoder import dynamic_masks
from sparseinst.modeling.sparse_inst.model import SparseInst
from sparseinst.modeling.sparse_inst.placed_decoder import ELLIPSE, NUM_CELLS
from sparseinst.modeling.sparse_inst.placed_levels import heatmap_of_levels, highest_peaks, levels_of
from sparseinst.modeling.sparse_inst.placed_masks import (
    CROP_SIZE,
    OUTSIDE,
    crop,
    cut_to_windows,
    ellipse_logits,
    enlarged,
    multiplied_out_logits,
    placed_masks,
)
from sparseinst.ops.coordinates import relative_centers
from sparseinst.runtime.optimize import optimize_for_inference
from sparseinst.structures.targets import InstanceTargets
from tests.runtime.test_export import check_export
from tests.tiny_model import DETAIL, placed_model, random_input, tiny_model


def positions_on_map(height, width):
    """Return y and x (1, height, width) of the pixels in shares of the map."""
    y, x = map(relative_centers, (height, width))
    return y[None, :, None].expand(1, -1, width), x.expand(1, height, -1)


def test_an_ellipse_fills_its_box():
    # A map of 8 x 16 cells; the box has its center in the map's, 4 rows and 12 columns.
    positions = positions_on_map(8, 16)
    logits = ellipse_logits(torch.tensor([[[0.5, 0.5, 0.5, 0.75, *ELLIPSE]]]), *positions)
    y, x = torch.arange(8) + 0.5 - 4, torch.arange(16) + 0.5 - 8
    inside = (y / 2).square()[:, None] + (x / 6).square() < 1
    assert torch.equal(logits[0, 0] > 0, inside) and inside.sum() > 30
    # By hand, one cell: v = 0.25, u = 1.5 / 6 with all factors.
    factors = [0.5, 1.0, -2.0, 3.0, -1.0, 4.0]
    ellipses = torch.tensor([[[0.5, 0.5, 0.5, 0.75, *factors]]])
    value = ellipse_logits(ellipses, *positions)[0, 0, 4, 9].item()
    v, u = 0.5 / 2, 1.5 / 6
    assert value == pytest.approx(0.5 + v - 2 * u + 3 * v**2 - u**2 + 4 * u * v, rel=1e-5)


def test_the_ellipse_of_a_tiny_box_is_exact_enough():
    # A box of one of 512 cells, at the far end of the map. In float64 by definition.
    ellipses = torch.tensor([[[0.95, 0.93, 1 / 512, 1 / 512, *ELLIPSE]]])
    y, x = positions_on_map(512, 512)
    v, u = (2 * 512 * (each.double() - center) for each, center in ((y, 0.95), (x, 0.93)))
    expected = 2 - 2 * v**2 - 2 * u**2
    near = expected > -50
    assert near.sum() > 10
    assert (ellipse_logits(ellipses, y, x)[:, 0] - expected)[near].abs().max() < 0.01
    # Clamped, and less exact.
    found = multiplied_out_logits(ellipses, y, x)[:, 0]
    assert (found - expected.clamp(OUTSIDE, -OUTSIDE))[near].abs().max() < 1 and found.min() == OUTSIDE


def test_16_bits_do_for_the_linear_forms(monkeypatch):
    # A box of a twelfth of the map. OpenVINO's bfloat16 rounds the factors and positions of products.
    rounded = lambda kernels, maps: dynamic_masks(kernels.bfloat16().float(), maps.bfloat16().float())  # noqa: E731
    ellipses = torch.tensor([[[0.7, 0.6, 1 / 12, 1 / 12, *ELLIPSE]]])
    expected = ellipse_logits(ellipses, *positions_on_map(96, 96))
    monkeypatch.setattr(placed_masks_module, "dynamic_masks", rounded)
    near = expected > -2
    assert (ellipse_logits(ellipses, *positions_on_map(96, 96)) - expected)[near].abs().max() < 1
    assert (multiplied_out_logits(ellipses, *positions_on_map(96, 96)) - expected)[near].abs().max() > 3


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_it_runs_in_16_bits(precision):
    model = placed_model()
    image = random_input(64, 96)
    with torch.no_grad():
        expected = model.network(model.preprocess([image]).tensor)["pred_masks"]
        optimized = optimize_for_inference(copy.deepcopy(model), precision=precision)
        found = optimized.network(model.preprocess([image]).tensor)["pred_masks"]
    assert not torch.equal(found, expected)
    assert ((found > 0) == (expected > 0)).float().mean() > 0.9


def test_displacements_separate_equal_pixels():
    # Two touching objects of equal pixels: columns 0 to 3 and 4 to 7. Boxes that reach two columns into the other.
    kernels, features = torch.ones(1, 2, 1), torch.ones(1, 1, 8, 8)
    ellipses = torch.tensor([[[0.5, 0.375, 1.0, 0.75, *ELLIPSE], [0.5, 0.625, 1.0, 0.75, *ELLIPSE]]])
    displacements = torch.zeros(1, 2, 8, 8)
    middle = placed_masks(kernels, ellipses, features, displacements)[0, :, 3:5]
    assert (middle[:, :, 2:6] > 0).all()
    # Each pixel moves by three columns away from the other object.
    displacements[0, 1, :, :4], displacements[0, 1, :, 4:] = -0.375, 0.375
    middle = placed_masks(kernels, ellipses, features, displacements)[0, :, 3:5] > 0
    assert middle[0, :, 2:4].all() and not middle[0, :, 4:].any()
    assert middle[1, :, 4:6].all() and not middle[1, :, :4].any()


def test_enlarged_boxes_by_hand():
    # On a map of 16 x 40 cells: a quarter of a width of 20 cells; two cells, more than a quarter of a height of 4. The
    # second box reaches the edges of the map.
    boxes = torch.tensor([[10.0, 6, 30, 10], [0, 0, 40, 15]])
    map_size = torch.tensor([40.0, 16, 40, 16])
    found = enlarged(boxes / map_size, map_size) * map_size
    torch.testing.assert_close(found, torch.tensor([[5.0, 4, 35, 12], [0, 0, 40, 16]]))


def test_the_windows_of_masks_by_hand():
    # On a map of 16 x 40 cells: boxes of 8 x 20 cells around (8, 20), and of 2 x 2 cells around (3, 5).
    ellipses = torch.zeros(1, 2, 10)
    ellipses[0, :, :4] = torch.tensor([[8.0, 20, 8, 20], [3, 5, 2, 2]]) / torch.tensor([16.0, 40, 16, 40])
    found = cut_to_windows(torch.zeros(1, 2, 16, 40), ellipses) > OUTSIDE
    expected = torch.zeros(1, 2, 16, 40, dtype=torch.bool)
    # A quarter of the size more on each side.
    expected[0, 0, 2:14, 5:35] = True
    # Two cells more on each side, which is more than a quarter of two.
    expected[0, 1, 0:6, 2:8] = True
    assert torch.equal(found, expected)


def test_masks_end_at_their_windows():
    model = placed_model("MODEL.SPARSE_INST.DECODER.NUM_LEVELS", 1).eval()
    with torch.no_grad():
        found = model.network(model.preprocess([random_input(64, 96)]).tensor)["pred_masks"]
    # Boxes have 6 of 8 rows and 6 of 12 columns of cells, windows half of that more: 18 of the masks' 24 columns, and
    # fewer at the edge.
    columns = (found > OUTSIDE).any(2).sum(2)
    assert columns.min() >= 9 and columns.max() == 18


def test_a_crop_of_a_plane_is_the_plane():
    # Bilinear samples of a linear function are exact between the centers of the outer cells.
    y, x = torch.arange(12.0)[:, None] + 0.5, torch.arange(20.0) + 0.5
    maps = torch.stack([2 * y + 3 * x, y - x])[None]
    windows = torch.tensor([[[2.0, 1, 9, 11], [0.5, 0.5, 19.5, 11.5]]]) / torch.tensor([20.0, 12, 20, 12])
    crops = crop(maps, windows)
    assert crops.shape == (1, 2, CROP_SIZE, CROP_SIZE)
    steps = (torch.arange(CROP_SIZE) + 0.5) / CROP_SIZE
    torch.testing.assert_close(crops[0, 0], 2 * (1 + 10 * steps)[:, None] + 3 * (2 + 7 * steps))
    torch.testing.assert_close(crops[0, 1], (0.5 + 11 * steps)[:, None] - (0.5 + 19 * steps))


def test_training_predicts_at_the_centers_what_inference_predicts_at_peaks(monkeypatch):
    model = placed_model().train()
    # Without the bound of training.
    monkeypatch.setattr(placed_masks_module, "OUTSIDE", -1e9)
    inputs = [random_input(64, 96, num_instances=count, seed=count) for count in (2, 0, 9)]
    images = model.preprocess(inputs)
    targets = model.prepare_targets(inputs, images)
    outputs_of_network = model.network(images.tensor)
    outputs = model.decoder.training_outputs(outputs_of_network, targets)
    # Of nine instances the first six have masks. The heat map learns all.
    assert outputs["is_center"][2].sum() == 9
    assert outputs["pred_masks"].shape == outputs["gt_masks"].shape == (8 * NUM_CELLS, CROP_SIZE, CROP_SIZE)
    of_image = slice(2 * NUM_CELLS, None)
    masks = targets[2].gt_masks[:6]
    windows = enlarged(outputs["gt_boxes"][None, of_image], torch.tensor([24.0, 16, 24, 16]))
    crops = crop(masks[None].repeat_interleave(NUM_CELLS, 1), windows)
    torch.testing.assert_close(outputs["gt_masks"][of_image], crops[0])
    # The same cells as peaks.
    classes, sizes = targets[2].gt_classes[:6], outputs_of_network["levels"]["sizes"]
    levels = levels_of(outputs["gt_boxes"][of_image][::NUM_CELLS], sizes[0], len(sizes))
    cells = heatmap_of_levels(masks, classes, levels, sizes, 3, NUM_CELLS)[2]
    assert (cells[:, 0] != cells[:, 1]).any()
    peaks = cells.view(1, -1), classes.repeat_interleave(NUM_CELLS)[None]
    monkeypatch.setattr(placed_decoder, "highest_peaks", lambda *args: peaks)
    # The windows of inference are those of predicted boxes.
    monkeypatch.setattr(placed_decoder, "cut_to_windows", lambda masks, ellipses: masks)
    with torch.no_grad():
        found = model.eval().network(images.tensor[2:])
    torch.testing.assert_close(outputs["pred_scores"][of_image], found["pred_scores"][0, :, 0])
    (expected,) = crop(found["pred_masks"], windows)
    torch.testing.assert_close(outputs["pred_masks"][of_image], expected, rtol=1e-2, atol=1e-2)


def test_the_losses_by_hand():
    model = placed_model()
    criterion = model.criterion
    outputs = {
        "heat_logits": torch.zeros(1, 3, 2, 2),
        "heat": torch.zeros(1, 3, 2, 2),
        "is_center": torch.zeros(1, 3, 2, 2, dtype=torch.bool),
        "pred_scores": torch.zeros(2),
        "boxes": torch.tensor([[0.0, 0, 1, 1], [0, 0, 0.5, 1]]),
        "gt_boxes": torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]]),
        "pred_masks": torch.zeros(2, 4, 4),
        "gt_masks": torch.zeros(2, 4, 4),
    }
    # Two cells of one instance.
    losses = criterion(outputs, [InstanceTargets(torch.tensor([1]), torch.zeros(1, 8, 8))])
    assert losses["loss_box"].item() == pytest.approx((0.5 + 0.5 * (0.5 - 0.05)) / 2)
    # Twelve cells of background with a probability of 1/2, class weight 2; 16 pixels at ln 2, weight 5.
    assert losses["loss_heatmap"].item() == pytest.approx(2 * 12 * 0.25 * math.log(2))
    assert losses["loss_mask"].item() == pytest.approx(5 * math.log(2))
    # The same instance again: equal means, but for the heat map.
    outputs |= {
        name: torch.cat([value, value]) for name, value in outputs.items() if "heat" not in name and name != "is_center"
    }
    two = criterion(outputs, [InstanceTargets(torch.tensor([1, 1]), torch.zeros(2, 8, 8))])
    assert two["loss_heatmap"].item() == pytest.approx(12 * 0.25 * math.log(2))
    for name in ("loss_box", "loss_mask", "loss_dice", "loss_objectness"):
        assert two[name].item() == pytest.approx(losses[name].item(), rel=1e-4, abs=1e-6), name


def test_the_objectness_target_of_a_thin_line_by_hand():
    # A line of one pixel covers half of each cell of stride 2. The predicted mask is the line.
    line = torch.zeros(NUM_CELLS, 4, 4)
    line[:, 1] = 0.5
    outputs = {
        "heat_logits": torch.zeros(1, 3, 2, 2),
        "heat": torch.zeros(1, 3, 2, 2),
        "is_center": torch.zeros(1, 3, 2, 2, dtype=torch.bool),
        "pred_scores": torch.full((NUM_CELLS,), 2.0),
        "boxes": torch.tensor([[0.0, 0, 1, 1]] * NUM_CELLS),
        "gt_boxes": torch.tensor([[0.0, 0, 1, 1]] * NUM_CELLS),
        "pred_masks": torch.where(line > 0, 0.0, -9.0),
        "gt_masks": line,
    }
    criterion = placed_model().criterion
    target = InstanceTargets(torch.tensor([1]), torch.zeros(1, 8, 8))
    # An IoU of 1: -log(sigmoid(2)).
    expected = pytest.approx(math.log(1 + math.exp(-2)), rel=1e-4)
    assert criterion(outputs, [target])["loss_objectness"].item() == expected
    # Of a whole object a cell that is covered by half is outside, as in the base class: the IoU is 4 / 8.
    line[:, 2] = 1.0
    outputs["pred_masks"] = torch.where(line > 0, 0.0, -9.0)
    expected = pytest.approx(math.log(1 + math.exp(2)) - 0.5 * 2, rel=1e-4)
    assert criterion(outputs, [target])["loss_objectness"].item() == expected


def test_an_object_that_vanishes_on_the_grid_is_not_learned():
    model = placed_model().train()
    masks = torch.zeros(3, 64, 96, dtype=torch.bool)
    masks[0, 8:40, 16:48] = masks[2, 30:50, 60:90] = True
    # The reduction by 4 reads the two pixels in the middle of a cell.
    masks[1, 20, 40] = True
    inputs = [random_input(64, 96, num_instances=3)]
    inputs[0]["instances"].gt_masks = BitMasks(masks)
    images = model.preprocess(inputs)
    (target,) = model.prepare_targets(inputs, images)
    classes = inputs[0]["instances"].gt_classes
    assert target.gt_classes.tolist() == classes[[0, 2]].tolist() and target.gt_masks.flatten(1).any(1).all()
    outputs = model.decoder.training_outputs(model.network(images.tensor), [target])
    assert outputs["is_center"].sum() == 2 and not outputs["is_center"][:, :, 0].any()
    # The published decoder has all of them.
    (published,) = tiny_model().prepare_targets(inputs, images)
    assert len(published.gt_classes) == len(published.gt_masks) == 3
    # Only such objects: the image has none.
    inputs[0]["instances"] = inputs[0]["instances"][1:2]
    assert all(torch.isfinite(loss) for loss in model(inputs).values())


def test_a_batch_without_objects_gives_every_parameter_a_gradient():
    """Ranks that train together wait for the gradients of all parameters."""
    model = placed_model(*DETAIL).train()
    losses = model([random_input(64, 96, num_instances=0, seed=seed) for seed in range(2)])
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert [name for name, loss in losses.items() if loss > 0] == ["loss_heatmap"]


def test_the_criterion_of_another_decoder_is_refused():
    with pytest.raises(ValueError, match="LOSS.NAME is SparseInstCriterion.*set it to PlacedCriterion"):
        placed_model("MODEL.SPARSE_INST.LOSS.NAME", "SparseInstCriterion")
    with pytest.raises(ValueError, match="PlacedCriterion with DECODER.NAME GroupIAMDecoder; set it to SparseInst"):
        tiny_model("MODEL.SPARSE_INST.LOSS.NAME", "PlacedCriterion")


def test_masks_see_the_detail_feature():
    model = placed_model(*DETAIL)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.backbone(images)
        outputs = [model.network(images)]
        model.backbone.forward = lambda _: {**features, "res2": 2 * features["res2"]}
        outputs.append(model.network(images))
    assert not torch.allclose(outputs[0]["pred_masks"], outputs[1]["pred_masks"], rtol=0.01)
    assert torch.equal(outputs[0]["pred_logits"], outputs[1]["pred_logits"])


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("MODEL.SPARSE_INST.DECODER.MASK.DETAIL_FEATURE", "res9"), "res9; the backbone's features are res2, res3"),
        (("MODEL.SPARSE_INST.DECODER.MASK.DETAIL_FEATURE", "res3"), "res3 has stride 8; the masks have 4"),
        ((*DETAIL, "MODEL.SPARSE_INST.DECODER.NAME", "GroupIAMDecoder"), "GroupIAMDecoder takes no such feature"),
    ],
)
def test_a_detail_feature_that_does_not_fit_is_refused(opts, message):
    with pytest.raises(ValueError, match=message):
        placed_model(*opts)


def test_boxes_need_a_whole_scale_factor():
    with pytest.raises(ValueError, match="SCALE_FACTOR is 1.5"):
        placed_model("MODEL.SPARSE_INST.DECODER.SCALE_FACTOR", 1.5)


NORM = ("MODEL.SPARSE_INST.DECODER.NORM", "BN")


def test_optimization_keeps_the_numbers_of_a_model_with_norms():
    model = placed_model(*NORM, *DETAIL)
    model.train()([random_input(64, 96, num_instances=2, seed=seed) for seed in range(2)])
    images = model.eval().preprocess([random_input(64, 96)]).tensor
    with torch.no_grad():
        expected = model.network(images)
        found = optimize_for_inference(copy.deepcopy(model)).network(images)
    torch.testing.assert_close(found["pred_masks"], expected["pred_masks"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("counts", "opts"), [((2, 1), NORM), ((0, 3), DETAIL), ((0, 0), DETAIL)])
def test_every_parameter_has_a_gradient(counts, opts):
    model = placed_model(*opts).train()
    losses = model([random_input(64, 96, num_instances=count, seed=count) for count in counts])
    assert losses.keys() == {"loss_heatmap", "loss_box", "loss_objectness", "loss_dice", "loss_mask"}
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None] == []


def test_the_losses_of_parts_add_up_to_those_of_the_whole():
    model = placed_model().train()
    inputs = [random_input(num_instances=count, seed=count) for count in (1, 4, 2)]
    whole = model(inputs)
    batches = [inputs[:1], inputs[1:]]
    parts = [model(batch, part) for batch, part in zip(batches, model.prepare_parts(batches))]
    for name, loss in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], loss)


def test_scores_are_those_of_the_peaks():
    model = placed_model("MODEL.SPARSE_INST.DECODER.OUTPUT_IAM", True)
    images = model.preprocess([random_input(64, 96)]).tensor
    heat = []
    model.decoder.inst_branch.heatmap.register_forward_hook(lambda module, args, output: heat.append(output))
    with torch.no_grad():
        outputs = model.network(images)
    sizes = [level.shape[-2:] for level in heat]
    assert sizes == [(8, 12), (4, 6), (2, 3)]
    joined = torch.cat([level.flatten(2) for level in heat], dim=2)
    cells, classes = highest_peaks(joined, sizes, 6)
    rows = torch.arange(6)
    assert torch.equal(outputs["pred_logits"][0, rows, classes[0]], joined[0][classes[0], cells[0]])
    # The other classes have no score.
    others = torch.ones(6, 3, dtype=torch.bool)
    others[rows, classes[0]] = False
    assert outputs["pred_logits"][0][others].sigmoid().max() < 1e-12
    assert outputs["pred_iam"].shape == outputs["pred_masks"].shape == (1, 6, 16, 24)
    (instances,) = model([random_input(64, 96)])
    assert len(instances["instances"]) > 0


def test_a_checkpoint_tells_the_numbers_of_classes_and_of_levels():
    state = placed_model("MODEL.SPARSE_INST.DECODER.NUM_LEVELS", 2).state_dict()
    keys = {"MODEL.SPARSE_INST.DECODER.NUM_CLASSES": 3, "MODEL.SPARSE_INST.DECODER.NUM_LEVELS": 2}
    assert SparseInst.trained_keys(state) == keys
    # The number of a config counts, which the decoder's stride may bound.
    assert SparseInst.trained_keys(placed_model().state_dict()) == {**keys, "MODEL.SPARSE_INST.DECODER.NUM_LEVELS": 4}
    state["decoder.inst_branch.levels"] = torch.tensor(1)
    assert len(SparseInst.trained_keys(state)) == 1


def test_the_network_exports_with_any_size():
    # Images of 64 x 64 pixels have 64 cells, fewer than these peaks.
    check_export(placed_model("MODEL.SPARSE_INST.DECODER.NUM_MASKS", 80, *DETAIL))
