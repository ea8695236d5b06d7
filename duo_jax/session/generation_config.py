"""What a model's generation_config.json suggests for drawing tokens."""

import pathlib

import msgspec

from duo_jax import files
from duo_jax.schema.check import convert, field_kinds, replace
from duo_jax.schema.json_reader import read_json
from duo_jax.serve.sampling import SamplingConfig


class _Drawing(msgspec.Struct):
    do_sample: bool | None = None


def suggested_sampling(folder: pathlib.Path, *, temperature: float = 0.0) -> SamplingConfig:
    """Return the sampling that the model in `folder` suggests; greedy where it suggests none.

    What the file leaves out, or says with null, stays off; only the temperature is 1 where
    do_sample is true without one. Without do_sample, only repetition_penalty counts.

    Args:
      folder: the model's folder.
      temperature: where the file does not say whether to draw.

    Raises:
      InputError: the file is broken, or a value is out of range.
    """
    file = folder / "generation_config.json"
    if not files.present(file):
        return SamplingConfig(temperature=temperature)
    found, where = read_json(file), files.shown(file)
    drawing = convert(found, _Drawing, where).do_sample
    names = field_kinds(SamplingConfig) if drawing else ["repetition_penalty"]
    values = {name: found[name] for name in names if found.get(name) is not None}
    unsaid = {None: temperature, True: 1.0, False: 0.0}[drawing]
    return replace(SamplingConfig(temperature=unsaid), values, where)
