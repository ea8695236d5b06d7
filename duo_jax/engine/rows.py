"""What a row of the batch has beside its caches: a page table, settings, tokens it may draw."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Array, Bool, Float

from duo_jax.engine.device import Device
from duo_jax.engine.sizes import Sizes
from duo_jax.engine.text import Text
from duo_jax.serve.row_sampling import RowSettings, Sampled, no_settings


class Rows:
    """The rows of a batch, as arrays that a step takes whole.

    Args:
      device: where their caches and histories are.
      sizes: of them.

    Attributes:
      table: int32 [row, page], the pages of each row's text, in its order. Masked tokens are read
        from the entries after them, so these are pages of its own too, not of who came before.
    """

    def __init__(self, device: Device, sizes: Sizes) -> None:
        most_pages = -(-sizes.max_len // sizes.page_size)
        self.table = np.zeros((sizes.max_requests, most_pages), np.int32)
        self._device = device
        self._settings = no_settings(sizes.max_requests)
        self._allowed = np.tile(device.everything_allowed, (sizes.max_requests, 1))

    def begin(self, text: Text) -> None:
        """Write a text's pages, settings and history into its row."""
        request, s, row = text.request, self._settings, text.row
        assert row is not None
        self.table[row] = text.pages[-1]
        self.table[row, : len(text.pages)] = text.pages
        sampling = request.sampling
        s.temperature[row] = sampling.temperature
        s.top_k[row] = min(sampling.top_k or 0, self._device.vocab_size)
        s.top_p[row] = 1.0 if sampling.top_p is None else sampling.top_p
        s.min_p[row] = sampling.min_p or 0.0
        s.repetition_penalty[row] = sampling.repetition_penalty or 1.0
        s.presence_penalty[row] = request.presence_penalty
        s.frequency_penalty[row] = request.frequency_penalty
        s.biased[row] = bool(request.logit_bias)
        s.filtered[row] = request.token_filter is not None
        s.logprobs[row] = request.logprobs is not None
        s.seed[row], s.choice[row] = request.seed, request.choice
        if text.has_history:
            written = text.tokens[len(request.prompt) :]
            self._device.begin_history(row, text.tokens, written, dict(request.logit_bias))

    def add_page(self, text: Text, page: int) -> None:
        """Append a page to those of a text."""
        self.table[text.row, len(text.pages)] = page
        text.pages.append(page)

    def move(self, text: Text, row: int) -> None:
        """Move a text, with its ring and history, to another row."""
        assert text.row is not None
        self._device.copy_row(text.row, row, history=True)
        for array in (self.table, self._allowed, *vars(self._settings).values()):
            array[row] = array[text.row]
        text.row = row

    def sample(
        self,
        logits: Float[Array, "batch vocab"],
        rows: slice,
        active: Bool[np.ndarray, " batch"],
        running: Mapping[int, Text],
    ) -> Sampled:
        """Draw a token for the running texts of some rows."""
        for row in range(rows.start, rows.stop):
            text = running.get(row)
            if text is not None:
                self._settings.position[row] = text.held
                if text.allowed is not None:
                    self._allowed[row] = text.allowed
        settings = RowSettings(**{k: v[rows] for k, v in vars(self._settings).items()})
        return self._device.sample(logits, rows.start, settings, active, self._allowed[rows])
