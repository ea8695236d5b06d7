"""Results as JSON files that people read and compare: a row to a line."""

import json
from collections.abc import Mapping
from typing import Any


def to_json(result: Mapping[str, Any]) -> str:
    """Write a result; every entry of its "rows" takes one line: a diff shows what changed."""
    head = json.dumps({**result, "rows": []}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    before, after = head.rsplit('"rows": []', 1)
    return f'{before}"rows": [\n{rows}\n ]{after}\n'
