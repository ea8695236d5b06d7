"""Command line of the demo model's training."""

if __name__ == "__main__":  # a signal ends what follows in one line: jax takes seconds to import
    from duo_jax.process import startup

    startup.begin()


from duo_jax import cli
from train.demo_model.flags import DemoConfig
from train.demo_model.run import train_demo_model

_DESCRIPTION = """\
Train the demo model from scratch: a Llama of 722 thousand parameters that finds passkeys in 1,024
tokens of text, in Hugging Face format. The text is the language reference that comes with Python.

Takes 20 minutes to an hour on a CPU. Progress is checkpointed in --workdir: the same command
resumes after an interruption, with the same result.
"""


def main(args: list[str] | None = None) -> None:
    """Run the command on a list of words; default: the process's own."""
    cli.run(
        train_demo_model,
        DemoConfig,
        prog="python -m train.demo_model",
        description=_DESCRIPTION,
        args=args,
    )


if __name__ == "__main__":
    main()
