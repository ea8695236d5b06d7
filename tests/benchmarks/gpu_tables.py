"""Tables of the GPU report for tests."""

import time

from benchmarks.gpu.tables import Table


def new_table(folder, *, seconds=60.0) -> Table:
    """Begin an empty table of a stage that has so much time."""
    return Table("some", folder=folder, header={"gpu": "none"}, deadline=time.monotonic() + seconds)
