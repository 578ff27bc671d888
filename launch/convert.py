"""Convert models, tensor by tensor: a Hugging Face directory or a GGUF file to an Orbax directory,
and an Orbax directory to a Hugging Face directory."""

from pathlib import Path

from absl import flags as absl_flags

from refine_af.launch import flags
from refine_af.models import convert, sources
from refine_af.progress import bar

_SOURCE = absl_flags.DEFINE_string("source", None, flags.MODEL_HELP)
_TARGET = absl_flags.DEFINE_string("target", None, "Directory to write; the source says its kind.")
_DTYPE = absl_flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "Of the written weights; default: as stored, float32 for GGUF.",
)
_OVERWRITE = absl_flags.DEFINE_bool(
    "overwrite",
    False,
    "Replace a model that is at the target, with all JSON and text files beside it; refused where "
    "anything else lies there.",
)


def main() -> None:
    """Open the source, write the target."""
    target = Path(flags.require(_TARGET)).expanduser()
    source = sources.open_model(flags.require(_SOURCE), param_dtype=None)
    total = convert.num_bytes(source.weights, _DTYPE.value)
    with bar("convert", total=total, unit="B") as progress:
        kind = convert.convert(
            source,
            target,
            dtype=_DTYPE.value,
            overwrite=_OVERWRITE.value,
            progress=progress.update,
        )
    note = "" if source.tokenizer is not None else "; no tokenizer was found in the source"
    print(f"{target}: {kind}, {total / 1e9:.2f} GB of weights{note}")


if __name__ == "__main__":
    flags.start(main, resumes=False, one_process=True)
