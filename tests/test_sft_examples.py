"""Examples for fine-tuning: prompts and masks by hand."""

import pytest
from transformers import PreTrainedTokenizerFast

from refine_af.finetuning import encode, pad
from refine_af.models.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id


def row(instruction: str, text: str = "", output: str = "la") -> dict[str, str]:
    return {"instruction": instruction, "input": text, "output": output}


def test_alpaca_without_an_input() -> None:
    prompt, response = encode(row("Sing."), TOKENIZER, "alpaca", EOS)
    assert TOKENIZER.decode(prompt) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSing.\n\n### Response:\n"
    )
    assert response == [*TOKENIZER("la").input_ids, EOS]


def test_alpaca_with_an_input() -> None:
    prompt, response = encode(row("Add.", "1 {2}", "3"), TOKENIZER, "alpaca", EOS)
    assert TOKENIZER.decode(prompt) == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 {2}\n\n### Response:\n"
    )
    assert response == [*TOKENIZER("3").input_ids, EOS]


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize(("text", "asked"), [("1 2", "Add.\n1 2"), ("", "Add.")])
def test_a_chat_has_the_task_as_the_turn_of_the_user(text: str, asked: str) -> None:
    prompt, response = encode(row("Add.", text, "3"), chat_tokenizer(), "chat", EOS)
    assert TOKENIZER.decode(prompt) == f"[user]{asked}[assistant]"
    assert response == [*TOKENIZER("3").input_ids, EOS]


def test_chat_needs_a_template() -> None:
    with pytest.raises(ValueError, match="tokenizer has no chat template; use raw"):
        encode(row("Add."), TOKENIZER, "chat", EOS)


def test_targets_are_the_positions_before_response_tokens() -> None:
    """Three tokens of prompt, two of response: columns 2 and 3 predict them. Then an idle row."""
    examples = pad([([7, 8, 9], [5, 2]), ([7], [5, 6, 2]), ([], [])], 6)
    assert examples.tokens.tolist() == [[7, 8, 9, 5, 2, 0], [7, 5, 6, 2, 0, 0], [0] * 6]
    assert examples.targets.tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 0, 0], [0] * 5]
