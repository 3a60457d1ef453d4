"""The order of the test files, and the slow tests."""

import pytest

# The slowest first, so that no worker waits for a long file at the end.
SLOWEST = (
    "test_solo", "test_yolact", "test_trainer", "test_configs", "test_finite", "test_benchmark_training",
    "test_published_configs",
    "test_export", "test_model", "test_commands", "test_names", "test_coco_evaluation", "test_console",
    "test_optimize", "test_launches", "test_interrupted_runs", "test_seam", "test_train_net", "test_stock_detectron2",
)  # fmt: skip

# Parts of the names of tests, with * between two, that `make test` leaves to `make test-slow`: variants of what another
# test shows, and what takes long. Continuous integration runs both.
SLOW = (
    "test_learning.py::",
    "test_published_configs.py::test_a_step_an_answer_and_a_checkpoint[solov2_x101",
    "test_published_configs.py::test_a_step_an_answer_and_a_checkpoint[solov2_r101",
    "test_published_configs.py::test_a_step_an_answer_and_a_checkpoint[adelaidet",
    "test_published_configs.py::test_a_step_an_answer_and_a_checkpoint[decoupled_solo_light_dcn",
    "test_published_configs.py::test_a_step_an_answer_and_a_checkpoint[solov2_light_512_dcn",
    "test_published_configs.py::test_a_step_an_answer_and_a_checkpoint[decoupled_solo_r",
    "test_published_configs.py::test_a_step_an_answer_and_a_checkpoint[solo_r101",
    "test_configs.py::test_a_step_an_answer_and_a_checkpoint[sparse_inst_r50vd",
    "test_configs.py::test_a_step_an_answer_and_a_checkpoint[sparse_inst_r50_dcn",
    "test_configs.py::test_a_step_an_answer_and_a_checkpoint[sparse_inst_r101",
    "test_configs.py::test_a_step_an_answer_and_a_checkpoint[sparse_inst_cspdarknet53",
    "test_configs.py::test_a_step_an_answer_and_a_checkpoint[sparse_inst_darknet53",
    "test_configs.py::test_a_step_an_answer_and_a_checkpoint[sparse_inst_pvt_b2",
    "parity/test_solo.py::*solov2_light_512", "parity/test_solo.py::*decoupled", "parity/test_solo.py::*[solo_r50",
    "test_published_configs.py::test_a_step_an_answer_and_a_checkpoint[yolact_plus",
    "test_published_configs.py::test_a_step_an_answer_and_a_checkpoint[yolact_base",
    "test_published_configs.py::test_a_step_an_answer_and_a_checkpoint[yolact_darknet53",
    "parity/test_yolact.py::*darknet53", "parity/test_yolact.py::*plus",
    "test_benchmark_training.py::test_memory_is_that_of_a_process", "test_benchmark_training.py::test_drawn_shapes",
    "test_benchmark_training.py::test_settings_are_measured",
    "test_benchmark.py::test_parts_of_an_optimized_model",
    "test_benchmark_training.py::test_the_command", "test_launches.py::*torchrun", "test_export.py::*mobilenetv3",
    "test_trainer.py::test_the_gradients_are_clipped_after_they_are_unscaled[float16",
    "test_launches.py::test_an_error_in_the_setup", "test_killed_rank.py::test_killed_under_launch",
    "test_interrupted_runs.py::test_killed_at_random", "test_interrupted_runs.py::test_a_seed_that_nobody",
    "test_export.py::test_backbones", "test_host_memory.py::test_freed_memory", "test_numbers.py::test_mixed_precision",
    "test_complexity.py::test_cspdarknet53", "test_complexity.py::test_small_configs",
    "test_threads.py::test_every_engine_returns_each_thread_its_own_answer[openvino",
    "test_threads.py::test_every_engine_returns_each_thread_its_own_answer[onnxruntime",
    "test_threads.py::test_every_engine_returns_each_thread_its_own_answer[compile",
    "test_export_configs.py::", "test_export_families.py::", "test_export_int8.py::",
    "test_quantize.py::test_a", "test_quantize.py::test_layers_behind", "test_quantize.py::test_predictions_of",
    "test_export.py::test_half_weights",
    "test_export.py::test_the_*torch]", "test_export.py::test_the_*openvino]",
    "test_export.py::test_a_file_predicts*torch", "test_export.py::test_a_file_predicts*openvino",
    "test_export.py::test_a_narrow_image*torch", "yolact/test_commands.py::test_an_exported_mask_iou_head",
    "test_optimize.py::test_openvino_gives_the_same_numbers_at_any_size[False",
    "solo/test_model.py::test_openvino[solo]", "test_shapes.py::test_classes_are", "test_shapes.py::test_color_area",
    "test_shapes.py::test_texture", "test_shapes.py::test_the_comparisons", "test_shapes.py::test_one_to_eight",
    "test_shapes.py::test_areas_places", "test_shapes.py::test_a_quarter", "test_recompute.py::test_a_compiled_network",
    "test_finite.py::test_what_overflows_at_every_scale", "test_finite.py::test_what_only_the_scaler",
    "test_console.py::test_a_training_survives_closed_streams[<", "distributed/test_predict.py::",
    "test_serve.py::test_a_service_starts_answers_and_stops[15", "test_no_thread_of_gloo_outlives_main[launcher1",
    "test_two_ranks_where_one_has_no_objects[decoupled_light",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    ranks = {name: rank for rank, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))
    for item in items:
        if any(all(part in item.nodeid for part in name.split("*")) for name in SLOW):
            item.add_marker(pytest.mark.slow)
