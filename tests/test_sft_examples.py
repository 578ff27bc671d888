"""Examples for fine-tuning: prompts by hand, their order, and how they are packed into rows."""

import dataclasses

import pytest
from transformers import PreTrainedTokenizerFast

from refine_af import packing
from refine_af.configs import tiny
from refine_af.models.byte_tokenizer import byte_tokenizer
from refine_af.sft_examples import Batches, Layout, Pair, encode, num_tokens, pack

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id


def row(instruction: str, text: str = "", output: str = "la") -> dict[str, str]:
    return {"instruction": instruction, "input": text, "output": output}


def test_alpaca_without_an_input() -> None:
    prompt, response = encode(row("Sing."), TOKENIZER, "alpaca", EOS)
    assert TOKENIZER.decode(prompt) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSing.\n\n### Response:"
    )
    assert response == [*TOKENIZER("la").input_ids, EOS]


def test_alpaca_with_an_input() -> None:
    prompt, response = encode(row("Add.", "1 {2}", "3"), TOKENIZER, "alpaca", EOS)
    assert TOKENIZER.decode(prompt) == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 {2}\n\n### Response:"
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


def test_a_template_that_makes_nothing_is_refused() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(ValueError, match=r"sft.format=chat: the tokenizer makes no token of 'Add"):
        encode(row("Add."), tokenizer, "chat", EOS)


def test_examples_lie_behind_each_other_in_their_rows() -> None:
    """Three tokens of prompt, two of response: columns 2 and 3 predict them. Then an empty row."""
    pairs = [([7, 8, 9], [5, 2]), ([7], [5, 6, 2]), ([8], [2])]
    rows = pack(pairs, Layout(3, 6, 4, 1))
    assert rows.tokens.tolist() == [[7, 8, 9, 5, 2, 0], [7, 5, 6, 2, 0, 0], [8, 2, 0, 0, 0, 0]]
    rows = pack(pairs, Layout(2, 6, 4, 1))
    assert rows.tokens.tolist() == [[7, 8, 9, 5, 2, 0], [7, 5, 6, 2, 8, 2]]
    assert rows.start.tolist() == [[0] * 6, [0, 0, 0, 0, 4, 4]]
    assert rows.columns.tolist() == [[2, 3, 0, 0], [0, 1, 2, 4]]
    assert rows.predicts.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert not pack(pairs[:1], Layout(2, 6, 4, 1)).predicts[1].any()


def batches(sizes: list[int], *, parts: int = 1, **options: int) -> Batches:
    """Examples of so many tokens, each with 10 of response."""
    sft = dataclasses.replace(tiny.get_config().sft, **options)
    pairs: list[Pair] = [([i] * (size - 10), [1] * 10) for i, size in enumerate(sizes)]
    return Batches(sft, 0, pairs[2:], pairs[:2], parts)


def test_every_example_is_seen_once_an_epoch_in_another_order() -> None:
    mine = batches(list(range(20, 33)), batch_size=4, num_epochs=2)
    assert (mine.per_epoch, mine.num_steps) == (3, 6)
    epochs = [[p for step in steps for p in mine.of_step(step)] for steps in ([0, 1, 2], [3, 4, 5])]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(mine.train)
    assert [*mine.of_held_out()] == [mine.held_out]
    assert num_tokens(mine.of_step(2)) == sum(len(p) + 10 for p, _ in mine.of_step(2))


@pytest.mark.parametrize(
    ("batch_size", "num_microbatches", "parts", "expected"),
    [
        (8, 1, 1, (3, 1)),  # three of 40 tokens in a row of 128
        (8, 4, 1, (4, 2)),  # no more than two rows at a time
        (8, 8, 1, (3, 3)),
        (8, 2, 4, (4, 1)),
        (8, 4, 4, (4, 1)),  # four devices have a row each
        (24, 3, 2, (8, 1)),
    ],
)
def test_rows_are_as_few_as_all_batches_need(
    batch_size: int, num_microbatches: int, parts: int, expected: tuple[int, int]
) -> None:
    sizes = [100, *[40] * 47]
    mine = batches(
        sizes, parts=parts, batch_size=batch_size, num_microbatches=num_microbatches, num_epochs=3
    )
    layout = mine.layout
    assert (layout.num_rows, layout.num_pieces) == expected
    assert layout.row_length == 128
    for pairs in [*map(mine.of_step, range(mine.num_steps)), *mine.of_held_out()]:
        rows = pack(pairs, layout)
        assert rows.tokens.shape == (layout.num_rows, 128)
        assert rows.predicts.sum() == 10 * len(pairs)
    assert batches(sizes).layout == batches(sizes).layout


def test_rows_that_do_not_suffice_are_counted_again() -> None:
    """Three of 70 do not fit into the two rows of 128 that their sum asks for."""
    mine = batches([70] * 5, batch_size=3, num_microbatches=1)
    assert packing.spread([70] * 3, 128, 2) == [[0], [1], [2]]
    assert mine.layout == (3, 128, 10, 1)
