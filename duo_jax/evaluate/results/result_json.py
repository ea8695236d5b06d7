"""Results as JSON files with one line per row, which diff well."""

import json
from collections.abc import Mapping
from typing import Any


def to_json(result: Mapping[str, Any]) -> str:
    """Return a result as JSON, with one line for every entry of its "rows"."""
    head = json.dumps({**result, "rows": []}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    before, after = head.rsplit('"rows": []', 1)
    return f'{before}"rows": [\n{rows}\n ]{after}\n'
