"""Programs are compiled before the first request comes, which would wait for them.

And so would the streams of all others: a program for more rows is compiled when they are there.
"""

import dataclasses

from duo_jax.engine.engine import Engine
from duo_jax.engine.request import Request, Update


def warm_up(engine: Engine) -> None:
    """Answer requests of every size, alone and together; before any other thread steps.

    Raises:
      RuntimeError: the engine failed at one.
    """
    sizes, updates = engine.sizes, list[Update]()
    if sizes.max_len < 2:
        return

    def answer(request: Request) -> None:
        engine.submit(request, updates.append)
        while engine.step():
            pass

    # As long as a chunk of a prompt can be, for each of the programs that read some.
    lengths = {min(length, sizes.max_len - 1) for length in (64, 256, sizes.prefill_chunk)}
    for token, length in enumerate(sorted(lengths)):  # none begins as one before, which is kept
        answer(_request(length, 1, token))
    # Penalties and biases have a history.
    answer(dataclasses.replace(_request(1, 1), presence_penalty=0.1))
    # One goes on after what was kept of another, within its last page.
    answer(_request(min(3, sizes.max_len - 1), 1))
    # One after the other joins, until every row is taken.
    for _ in range(sizes.max_requests):
        request = _request(1, min(sizes.max_requests + 2, sizes.max_len - 1))
        engine.submit(request, updates.append)
        engine.step()
        if engine.stats().waiting:  # there are no pages for more
            break
    while engine.step():
        pass
    for update in updates:
        if update.error is not None:
            raise RuntimeError(f"the engine fails: {update.error}")


def _request(length: int, max_tokens: int, token: int = 0) -> Request:
    return Request(prompt=(token,) * length, max_tokens=max_tokens, ignore_eos=True)
