"""Command line of conversion."""

if __name__ == "__main__":  # a signal ends what follows in one line: jax takes seconds to import
    from duo_jax.process import startup

    startup.begin()


import jax

from convert.config import ConvertConfig
from convert.run import convert
from duo_jax import cli

_DESCRIPTION = """\
Convert a model from Hugging Face safetensors or GGUF to an orbax checkpoint of duo_jax, or to
safetensors (--to-hf).

Every command of duo_jax also reads Hugging Face folders and GGUF files directly. A checkpoint is
compressed, and its weights may be quantised in advance (--weights). Without --dtype and --weights
both directions keep every bit; what a GGUF file has in blocks becomes float32. Other files of the
model's folder, such as tokenizer, presets, pattern and prompt, are copied. Host memory is needed
for about one tensor, and DST appears only when it is complete.
"""


def main(args: list[str] | None = None) -> None:
    """Run the command on a list of words; default: the process's own."""
    jax.config.update("jax_platforms", "cpu")  # orbax starts jax, which would claim the GPU
    cli.run(convert, ConvertConfig, prog="python -m convert", description=_DESCRIPTION, args=args)


if __name__ == "__main__":
    main()
