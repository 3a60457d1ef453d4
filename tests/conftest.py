"""The order of the test files: the slowest first, so that no worker waits for a long file at the end."""

SLOWEST = (
    "test_trainer", "test_interrupted_runs", "test_finite", "test_benchmark_training", "test_quick", "test_train_net",
    "test_launches", "test_seam", "test_learning", "test_solo", "test_published_configs", "test_configs",
    "test_killed_rank", "test_numbers", "test_export", "test_optimize", "test_shapes",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    ranks = {name: rank for rank, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))
