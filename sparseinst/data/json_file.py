"""Read JSON files."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raise ValueError where it does not exist or cannot be read."""
    if not path.is_file():
        raise ValueError(f"The file {path} does not exist")
    try:
        content = path.read_bytes()
        # UTF-8, or UTF-16 or 32, as Windows programs save it, with or without a byte order mark.
        return json.loads(content.decode(json.detect_encoding(content)))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not a COCO json: its lists are nested too deep") from error
    except ValueError as error:  # of the encoding or of the JSON
        raise ValueError(f"{path} is not valid JSON (cut off?): {error}") from error
