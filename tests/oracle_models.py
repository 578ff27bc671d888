"""Tiny models of the paper's oracles in torch, and their directories with real tokenizers."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import GPTNeoXConfig, GPTNeoXModel, T5Config, T5ForConditionalGeneration

# No size divides another by chance, none is a default of transformers: what gets lost shows.
NEOX: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "layer_norm_eps": 1e-4,
    "rotary_emb_base": 500,
    "rotary_pct": 0.5,
    "hidden_act": "gelu",
}
T5: dict[str, Any] = {
    "vocab_size": 160,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "layer_norm_epsilon": 1e-4,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
CORPUS = [
    "question: Is this a natural response in the dialogue? response: dialogue history:",
    "question: Is this an understandable response in the dialogue? Yes No Yes No",
    "question: Is this a coherent response given the dialogue history? Yes No",
    "Write the capital of France.\nParis is a city, naive cafe, 1234567890!",
]


class RewardModel(torch.nn.Module):
    """OpenAssistant's module, in a few lines of our own."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.gpt_neox = GPTNeoXModel(config)
        self.out_proj = torch.nn.Linear(config.hidden_size, 1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.gpt_neox(ids, attention_mask=mask).last_hidden_state
        last = mask.cumsum(dim=1).argmax(dim=1)
        return self.out_proj(hidden[torch.arange(len(ids)), last])[:, 0]


def _randomise(model: torch.nn.Module) -> None:
    """Every parameter random, norms and biases too, so large that results are of order 1."""
    torch.set_num_threads(1)  # its threads and XLA's, spinning on the same cores: 30 times slower
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))


def reward_model(*, parallel: bool = True) -> RewardModel:
    config = GPTNeoXConfig(**NEOX, use_parallel_residual=parallel)
    config._attn_implementation = "eager"
    model = RewardModel(config).eval()
    _randomise(model)
    return model


def t5_model(*, tied: bool) -> T5ForConditionalGeneration:
    model = T5ForConditionalGeneration(T5Config(**T5, tie_word_embeddings=tied)).eval()
    if not tied:  # transformers 5 always ties them at first
        model.lm_head.weight = torch.nn.Parameter(torch.empty(T5["vocab_size"], T5["d_model"]))
    _randomise(model)
    return model


def neox_raw(**changes: Any) -> dict[str, Any]:
    """config.json as OpenAssistant published it, with these sizes."""
    kind = {"model_type": "gpt_neox_reward_model", "architectures": ["GPTNeoXRewardModel"]}
    return {**kind, **NEOX, "pooling": "last", "use_parallel_residual": True, **changes}


def t5_raw(**changes: Any) -> dict[str, Any]:
    """config.json as transformers 4 wrote it."""
    kind = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    return {**kind, **T5, "is_encoder_decoder": True, "tie_word_embeddings": False, **changes}


def neox_tensors(model: RewardModel) -> dict[str, torch.Tensor]:
    """State with the buffers that old releases saved."""
    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    for i in range(NEOX["num_hidden_layers"]):
        prefix = f"gpt_neox.layers.{i}.attention"
        state[f"{prefix}.bias"] = torch.ones(1, 1, 96, 96, dtype=torch.bool)
        state[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
        state[f"{prefix}.rotary_emb.inv_freq"] = torch.ones(4)
    return state


def t5_tensors(model: T5ForConditionalGeneration) -> dict[str, torch.Tensor]:
    """State with all the copies that old releases saved."""
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def save(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    raw: dict[str, Any],
    form: str = "safetensors",
    parts: int = 1,
) -> Path:
    """Directory with weights as `safetensors` or `bin`, in one file or in numbered parts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    stem, end = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}[form]
    write: Any = save_file if form == "safetensors" else torch.save
    if parts == 1:
        write(tensors, folder / f"{stem}.{end}")
        return folder
    names = [f"{stem}-{i + 1:05}-of-{parts:05}.{end}" for i in range(parts)]
    owners = {key: names[i % parts] for i, key in enumerate(tensors)}
    for name in names:
        write({key: t for key, t in tensors.items() if owners[key] == name}, folder / name)
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"weight_map": owners}))
    return folder


def write_neox_tokenizer(folder: Path) -> None:
    """Byte-level BPE with OpenAssistant's special tokens, in the files of GPT-NeoX."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_special_tokens(["<|prompter|>", "<|assistant|>"])
    _write(folder, tokenizer, {"tokenizer_class": "GPTNeoXTokenizer"})


def write_t5_tokenizer(folder: Path) -> None:
    """Unigram pieces that end texts with `</s>`, in the files of T5."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    answers = [("▁Yes", -1.0), ("▁No", -1.0)]  # whole words, as in T5's vocabulary
    tokenizer.model = models.Unigram([*map(tuple, pieces), *answers], unk_id=2)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _write(folder, tokenizer, {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, **names})


def _write(folder: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@functools.cache
def _scratch() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory()


def scratch() -> Path:
    """A directory that lasts as long as this process."""
    return Path(_scratch().name)


@functools.cache
def neox_directory() -> Path:
    """A whole directory of the reward model, which lasts as long as this process."""
    folder = scratch() / "neox"
    save(folder, neox_tensors(reward_model()), neox_raw(), "bin")
    write_neox_tokenizer(folder)
    return folder


@functools.cache
def t5_directory() -> Path:
    """A whole directory of UniEval, which lasts as long as this process."""
    folder = scratch() / "t5"
    save(folder, t5_tensors(t5_model(tied=False)), t5_raw(), "bin")
    write_t5_tokenizer(folder)
    return folder


def tokenizer_of(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
