"""The splits of a decode kernel, put together."""

from jaxtyping import Array, Float

from kernels.dispatch import Implementation
from kernels.merge import merge_lse


def merged(
    out: Float[Array, "splits *rows head_dim"],
    lse: Float[Array, "splits *rows"],
    *,
    implementation: Implementation,
) -> tuple[Float[Array, "*rows head_dim"], Float[Array, "*rows"]]:
    """Merge the splits by their lse; one split is the result."""
    if out.shape[0] == 1:
        return out[0], lse[0]
    return merge_lse(out, lse, implementation=implementation)
