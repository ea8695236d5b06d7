"""Write a model's parameters as an orbax checkpoint, a few tensors at a time.

An ordinary orbax save takes the whole tree, which for a 70B model is 140 GB of host memory. Partial
saves (orbax.checkpoint.experimental.v1.partial) add arrays to a checkpoint that becomes visible
when it is finalized, and the result is one ordinary checkpoint. Two choices keep this fast and
small:

- The time of a partial save grows with the number of saves (300 saves of one small array each took
  59 s, and 20 s to finalize; 32 took 1.2 s and 0.4 s). So tensors are saved in groups that are
  together no larger than the model's largest tensor, or than _MIN_GROUP for small models.
- Arrays are written in chunks of 8 MB. Orbax copies a group once; without chunks, tensorstore would
  also lay out and compress every array as a whole.
"""

import contextlib
import os
import pathlib
import time
from collections.abc import Callable, Iterator

import numpy as np

from duo_jax.checkpoints.orbax_checkpoint import nested, orbax_path, stored_shapes
from duo_jax.checkpoints.quiet_orbax import quiet_orbax
from duo_jax.checkpoints.tensor_info import cast
from duo_jax.checkpoints.tensor_names import Path, Tensor
from duo_jax.checkpoints.weights import WeightFiles, read_array
from duo_jax.model.quantised_weights import StoredFormat, quantise
from duo_jax.process import signals
from duo_jax.schema import checksums

_MIN_GROUP = 1 << 24
_CHUNK = 1 << 23
_LOOK = 0.1  # seconds between looks at a folder
_QUIET_LOOKS = 5  # without a change
_LONGEST_WAIT = 30.0  # seconds until it is quiet


def write_params(
    path: pathlib.Path,
    weight_files: WeightFiles,
    *,
    dtype: np.dtype | None,
    stored: StoredFormat = "model",
    progress: Callable[[int], object],
) -> dict[str, str]:
    """Write all tensors of `weight_files` below `path`, which must not exist.

    Args:
      path: the orbax checkpoint to make.
      weight_files: where tensors come from.
      dtype: type to cast to; None keeps each tensor's own.
      stored: format of the layers' projections; "int8" and "int4" quantise the values read.
      progress: called with the number of bytes read after each group.

    Returns:
      The checksum of every array that was written, by its path, such as "norm/scale".

    Raises:
      InputError: a tensor cannot be read or cast.
    """
    from orbax.checkpoint.experimental import v1 as ocp

    path = orbax_path(path)
    context, digests = ocp.Context(), {}
    context.array.saving.storage_options.chunk_byte_size = _CHUNK
    with context:
        for group in _groups(weight_files, dtype):
            arrays = {}
            for tensor in group:
                arrays |= _stored(tensor, read_array(weight_files, tensor), dtype, stored)
            digests |= {"/".join(path): checksums.of_array(a) for path, a in arrays.items()}
            with signals.put_off(), _alone_after(path.parent), quiet_orbax():
                ocp.partial.save(str(path), nested(arrays))
            progress(sum(weight_files.dtype(tensor).itemsize * tensor.size for tensor in group))
        with signals.put_off(), _alone_after(path.parent), quiet_orbax():
            ocp.partial.finalize(str(path))
    return digests


@contextlib.contextmanager
def _alone_after(folder: pathlib.Path) -> Iterator[None]:
    """After an error, wait until nobody writes to a folder that is about to be removed.

    The threads of tensorstore write the chunks of an array side by side, and those that are left at
    the first error, too; they would make the folder again. Nothing tells when they have ended, but
    until then files come and go, or the processor is busy.
    """
    try:
        yield
    except Exception:
        now, quiet, deadline = [*os.walk(folder)], 0, time.monotonic() + _LONGEST_WAIT
        while quiet < _QUIET_LOOKS and time.monotonic() < deadline:
            before, busy = now, time.process_time()
            time.sleep(_LOOK)
            now = [*os.walk(folder)]
            is_quiet = now == before and time.process_time() - busy < _LOOK / 2
            quiet = quiet + 1 if is_quiet else 0
        raise


def _stored(
    tensor: Tensor, array: np.ndarray, dtype: np.dtype | None, stored: StoredFormat
) -> dict[Path, np.ndarray]:
    """Return a tensor as the arrays that are to be written."""
    paths = tuple(stored_shapes(tensor, stored))
    if len(paths) == 1:
        return {paths[0]: cast(array, dtype or array.dtype, tensor.name)}
    kernel = quantise(array, module=tensor.path[-2], weight_format=stored, name=tensor.name)
    arrays = map(np.asarray, (kernel.values, kernel.scales))
    return dict(zip(paths, arrays, strict=True))


def _groups(weight_files: WeightFiles, dtype: np.dtype | None) -> Iterator[list[Tensor]]:
    """Split the tensors, in order, into groups no larger than the largest of them."""
    sizes = [
        (dtype or weight_files.dtype(tensor)).itemsize * tensor.size
        for tensor in weight_files.tensors
    ]
    limit = max(_MIN_GROUP, *sizes)
    group: list[Tensor] = []
    group_size = 0
    for tensor, size in zip(weight_files.tensors, sizes, strict=True):
        if group_size + size > limit:
            yield group
            group, group_size = [], 0
        group.append(tensor)
        group_size += size
    yield group
