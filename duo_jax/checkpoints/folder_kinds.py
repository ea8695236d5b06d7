"""Folders that look like a model's and are none that can be read: what they are, and what to do."""

import pathlib

from duo_jax import files
from duo_jax.checkpoints.orbax_checkpoint import is_checkpoint
from duo_jax.checkpoints.safetensors_files import has_safetensors
from duo_jax.errors import InputError, quoted
from duo_jax.schema.json_reader import read_json

MERGE_LORA = (
    "merge it into its model first: peft's AutoPeftModelForCausalLM.from_pretrained(FOLDER)"
    ".merge_and_unload().save_pretrained(NEW_FOLDER)"
)
_ADAPTER = "adapter_config.json"
_ADAPTER_FILES = (_ADAPTER, "adapter_model.safetensors", "adapter_model.bin")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_DEEPSPEED = ("global_step*", "zero_pp_rank_*", "mp_rank_*", "zero_to_fp32.py")
_FSDP = ("pytorch_model_fsdp*", "optimizer_[0-9]*", "*.distcp")
_TRAINER = ("optimizer.*", "scheduler.*", "training_args.bin", "trainer_state.json", "rng_state*")
_OTHER_FORMATS = {
    "consolidated*": "weights in their author's own format; name the version of the model that "
    "was converted for transformers",
    "*.gguf": "weights as GGUF; name the file instead of its folder",
    "tf_model*.h5": "weights for TensorFlow only; save them with transformers as safetensors",
    "flax_model*.msgpack": "weights for Flax only; save them with transformers as safetensors",
    "*.safetensors": "safetensors under other names than model.safetensors, or their "
    "model.safetensors.index.json is missing; was the download complete?",
}


def refuse_what_is_no_model(folder: pathlib.Path) -> None:
    """Refuse a folder without weights of a whole model that is recognised as something else.

    Raises:
      InputError: a LoRA, the state of a training run, or weights in a format that is not read;
        says so, and what to do.
    """
    if is_checkpoint(folder) or has_safetensors(folder):
        return
    if any(files.exists(folder / name) for name in _PICKLED):
        return
    if any(files.exists(folder / name) for name in _ADAPTER_FILES):
        raise InputError(f"{folder} is an adapter (LoRA){_base(folder)}, no model; {MERGE_LORA}")
    found = _found(folder, *_DEEPSPEED)
    if found:
        raise InputError(
            f"{folder} is a checkpoint of DeepSpeed ({found}), no model; make one with its "
            "zero_to_fp32.py (--safe_serialization)"
        )
    found = _found(folder, *_FSDP)
    if found:
        raise InputError(
            f"{folder} is a sharded checkpoint of a training run ({found}), no model; make one "
            "with accelerate merge-weights"
        )
    runs = sorted(folder.glob("checkpoint-[0-9]*"), key=lambda run: (len(run.name), run.name))
    if runs:
        raise InputError(
            f"{folder} is the folder of a training run, no model; name one of its checkpoints, "
            f"such as {runs[-1]}"
        )
    found = _found(folder, *_TRAINER)
    if found:
        raise InputError(
            f"{folder} holds the state of a training run ({found}), but no weights; save the model "
            "with trainer.save_model(NEW_FOLDER)"
        )
    for pattern, what in _OTHER_FORMATS.items():
        found = _found(folder, pattern)
        if found:
            raise InputError(f"{folder} holds {found}: {what}")


def _found(folder: pathlib.Path, *patterns: str) -> str:
    """Return the name of the first entry that matches one of the patterns; "" if none does."""
    with files.reading(folder):
        return next((path.name for p in patterns for path in sorted(folder.glob(p))), "")


def _base(folder: pathlib.Path) -> str:
    """Return "of MODEL" where the adapter's file names one."""
    if not files.present(folder / _ADAPTER):
        return ""
    base = read_json(folder / _ADAPTER).get("base_model_name_or_path")
    return f" of {quoted(base)}" if isinstance(base, str) else ""
