"""YOLACT learns 8 drawn images by heart."""

from sparseinst.tools import train_net
from sparseinst.tools.make_shapes import write_shapes_dataset
from tests.loggers import loggers_restored


def test_yolact_overfits_drawn_images(tmp_path):
    write_shapes_dataset(tmp_path, 8, 0, 128, split="train")
    data = (str(tmp_path / "train.json"), str(tmp_path / "train"))
    args = [
        "--config-file", "quick/shapes_yolact", "--train-json", data[0], "--train-images", data[1],
        "--test-json", data[0], "--test-images", data[1], "OUTPUT_DIR", str(tmp_path / "out"), "SEED", "1",
        "SOLVER.MAX_ITER", "200", "SOLVER.BASE_LR", "0.003", "SOLVER.IMS_PER_BATCH", "8",
        "SOLVER.CHECKPOINT_PERIOD", "1000", "INPUT.RANDOM_FLIP", "none", "TEST.PLOTS", "False",
        # A narrow backbone, which takes a third of the time of the config's.
        "MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.STEM_OUT_CHANNELS", "16", "MODEL.RESNETS.WIDTH_PER_GROUP", "16",
        "MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.FPN.OUT_CHANNELS", "32", "MODEL.YOLACT.CHANNELS", "32",
        "MODEL.YOLACT.PROTOTYPE_NET.CHANNELS", "32",
    ]  # fmt: skip
    with loggers_restored():
        results = train_net.main(train_net.build_parser().parse_args(args))
    assert results["segm"]["AP"] >= 80
