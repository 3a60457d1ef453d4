"""The order of the test files: the slowest first, so that no worker waits for a long file at the end."""

SLOWEST = (
    "test_published_configs", "test_solo", "test_configs", "test_benchmark_training", "test_trainer", "test_export",
    "test_learning", "test_finite", "test_launches", "test_model", "test_interrupted_runs", "test_commands",
    "test_names", "test_optimize", "test_console", "test_shapes", "test_complexity", "test_seam",
    "test_killed_rank", "test_numbers", "test_train_net",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    ranks = {name: rank for rank, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))
