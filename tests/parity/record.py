"""Record the numbers of a config that files in tests/parity/solo and tests/parity/yolact hold of the published code.

``python tests/parity/record.py configs/solo/solo_r50_3x.yaml solo_r50.json``
"""

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sparseinst.config import load_config
from tests.parity import record_solo, record_yolact

RECORDERS = {"SOLO": record_solo, "SOLOv2": record_solo, "YOLACT": record_yolact}


def record(config: str) -> dict:
    """Record everything of a config."""
    return RECORDERS[load_config(config).MODEL.META_ARCHITECTURE].record(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="YAML file, or the name of one that comes with the package")
    parser.add_argument("output", help="JSON file to write")
    args = parser.parse_args()
    Path(args.output).write_text(json.dumps(record(args.config), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
