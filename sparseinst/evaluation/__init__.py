"""Evaluation: AP, speed, and the time of each stage."""

from sparseinst.evaluation.checks import check_evaluation, check_test_config
from sparseinst.evaluation.coco_evaluation import EncodedMaskEvaluator, check_coco_eval
from sparseinst.evaluation.evaluate import build_evaluator, evaluate, figures_table
from sparseinst.evaluation.stage_timer import StageTimer, now

__all__ = [
    "EncodedMaskEvaluator",
    "StageTimer",
    "build_evaluator",
    "check_coco_eval",
    "check_evaluation",
    "check_test_config",
    "evaluate",
    "figures_table",
    "now",
]
