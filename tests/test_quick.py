"""The expected results of the quickstart: `make quickstart` trains the model and compares its AP with them."""

import re
from pathlib import Path

from sparseinst.config import load_config


def test_makefile_passes_the_expected_results():
    assert not load_config("quick/shapes").TEST.EXPECTED_RESULTS  # so that a changed copy of the file does not fail
    makefile = Path(__file__).resolve().parents[1] / "Makefile"
    value = re.search(r"^QUICK_EXPECTED := (.+)$", makefile.read_text(), re.MULTILINE)[1]
    assert "TEST.EXPECTED_RESULTS '$(QUICK_EXPECTED)'" in makefile.read_text()
    expected = load_config("quick/shapes", ["TEST.EXPECTED_RESULTS", value]).TEST.EXPECTED_RESULTS
    tolerances = {(task, metric): (value, tolerance) for task, metric, value, tolerance in expected}
    for metric, floor in (("AP", 40), ("AP50", 65)):
        value, tolerance = tolerances["segm", metric]
        # verify_results() fails outside of value +- tolerance, so below the floor at the least.
        assert value - tolerance >= floor
