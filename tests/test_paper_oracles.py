"""The paper's oracles: their exact texts, ids and scores, from directories with real tokenizers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from oracle_models import (
    neox_directory,
    reward_model,
    t5_directory,
    t5_model,
    tokenizer_of,
    write_neox_tokenizer,
    write_t5_tokenizer,
)

from refine_af import paper_oracles, rewards
from refine_af.config import PAPER_COMPONENTS, Mesh, Reward
from refine_af.mesh import make_mesh
from refine_af.paper_oracles import OasstRewardModel, UniEval
from refine_af.rewards import Example

PARIS = Example("Name the capital of France.", "", "Paris")
EXAMPLES = [
    PARIS,
    Example("Is this natural?", "naïve café {output}", "Yes </s> No"),
    Example("Write a dialogue.\nThen stop.", "  two  spaces ", "a: Yes\nb: No\n\nc: {context}"),
    Example("Say nothing.", "", ""),
    Example("Name the capital of France.", "Quickly!", "Paris, France."),
    PARIS,
]
LONG = "the response is a natural dialogue of France, "


@pytest.fixture(scope="module")
def one() -> jax.sharding.Mesh:
    return make_mesh(Mesh(), jax.devices()[:1])


@pytest.fixture(scope="module")
def oasst(one: jax.sharding.Mesh) -> OasstRewardModel:
    return OasstRewardModel.load(neox_directory(), one)


@pytest.fixture(scope="module")
def unieval(one: jax.sharding.Mesh) -> UniEval:
    return UniEval.load(str(t5_directory()), one)


# Texts and ids


class Recorder:
    """A tokenizer that remembers its texts."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.texts = tokenizer, []

    def __call__(self, text: str, **options: Any) -> Any:
        self.texts.append(text)
        return self.tokenizer(text, **options)


def test_the_texts_byte_for_byte(oasst: OasstRewardModel, unieval: UniEval) -> None:
    example = Example("Translate.", "Bon  jour", " Good {day}\n")
    recorder: Any = Recorder(oasst.tokenizer)
    OasstRewardModel(oasst.config, oasst.params, recorder, oasst.mesh).token_ids(example)
    assert recorder.texts == [
        "<|prompter|>Translate.\nBon  jour<|endoftext|><|assistant|> Good {day}\n<|endoftext|>"
    ]
    assert paper_oracles.questions(example) == {
        "nat": "question: Is this a natural response in the dialogue? </s> response:  Good {day}\n",
        "und": "question: Is this an understandable response in the dialogue? </s> "
        "response:  Good {day}\n",
        "coh": "question: Is this a coherent response given the dialogue history? </s> "
        "response:  Good {day}\n </s> dialogue history: Translate.\nBon  jour",
    }


def test_special_tokens_are_single_ids(oasst: OasstRewardModel, unieval: UniEval) -> None:
    row = oasst.token_ids(PARIS)
    prompter, end, assistant = (
        oasst.tokenizer.convert_tokens_to_ids(t)
        for t in ("<|prompter|>", "<|endoftext|>", "<|assistant|>")
    )
    middle = row.index(end)
    assert (row[0], row[middle + 1], row[-1]) == (prompter, assistant, end)
    assert oasst.tokenizer.decode(row[1:middle]) == PARIS.context
    assert oasst.tokenizer.decode(row[middle + 2 : -1]) == PARIS.output
    question = unieval.token_ids(paper_oracles.questions(PARIS)["coh"])
    assert question.count(1) == 3 and question[-1] == 1  # two written ones, and the end
    vocabulary = unieval.tokenizer.get_vocab()
    assert unieval.answers == (vocabulary["▁Yes"], vocabulary["▁No"])


def test_a_long_task_loses_its_beginning(oasst: OasstRewardModel) -> None:
    limit = oasst.config.max_positions
    example = Example(LONG * 9, "the end", "a short answer")
    whole = oasst.tokenizer(
        f"<|prompter|>{example.context}<|endoftext|><|assistant|>a short answer<|endoftext|>"
    ).input_ids
    row = oasst.token_ids(example)
    assert len(whole) > limit == len(row)
    assert row == whole[:1] + whole[len(whole) - limit + 1 :]
    text = oasst.tokenizer.decode(row)
    assert text.endswith("the end<|endoftext|><|assistant|>a short answer<|endoftext|>")


@pytest.mark.parametrize("spare", [-2, -1, 0, 1])
def test_an_answer_of_about_the_limit_keeps_all_special_tokens(
    spare: int, oasst: OasstRewardModel
) -> None:
    """`spare` tokens are left for the task; the answer gives way when none is."""
    limit = oasst.config.max_positions
    output = "!" * (limit - 4 - spare)
    row = oasst.token_ids(Example("Explain it.", "", output))
    assert len(row) == limit
    end, assistant = row[-1], oasst.tokenizer.convert_tokens_to_ids("<|assistant|>")
    at = row.index(end)
    assert row[0] == oasst.tokenizer.convert_tokens_to_ids("<|prompter|>")
    assert row[at + 1] == assistant and at - 1 == max(spare, 0)
    assert oasst.tokenizer.decode(row[at + 2 : -1]) == "!" * min(limit - 4, len(output))


def test_a_long_question_loses_its_end(unieval: UniEval) -> None:
    text = paper_oracles.questions(Example(LONG * 99, "", "Yes"))["coh"]
    whole = unieval.tokenizer(text, verbose=False).input_ids
    assert len(whole) > 1024
    assert unieval.token_ids(text) == [*whole[:1023], 1]


# Scores


def reference_rewards(examples: list[Example]) -> np.ndarray:
    """Padded in list order, one batch."""
    tokenizer = tokenizer_of(neox_directory())
    tokenizer.padding_side = "right"
    texts = [
        f"<|prompter|>{e.context}<|endoftext|><|assistant|>{e.output}<|endoftext|>"
        for e in examples
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return reward_model()(batch["input_ids"], batch["attention_mask"]).numpy()


def reference_answers(examples: list[Example]) -> dict[str, np.ndarray]:
    """UniEval's way, padded in list order, one batch a question."""
    tokenizer, model, found = tokenizer_of(t5_directory()), t5_model(tied=False), {}
    yes, no = (tokenizer(answer)["input_ids"][0] for answer in ("Yes", "No"))
    for name in ("nat", "und", "coh"):
        texts = [paper_oracles.questions(example)[name] for example in examples]
        batch = tokenizer(
            texts, max_length=1024, truncation=True, padding=True, return_tensors="pt"
        )
        start = torch.zeros(len(texts), 1, dtype=torch.long)
        with torch.no_grad():
            logits = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                decoder_input_ids=start,
            ).logits[:, 0]
        p = torch.softmax(logits, dim=-1)
        found[name] = (p[:, yes] / (p[:, yes] + p[:, no])).numpy()
    return found


def test_rewards_are_those_of_torch(oasst: OasstRewardModel) -> None:
    found = oasst(EXAMPLES)
    assert found.keys() == {"rew"} and found["rew"].dtype == np.float64
    expected = reference_rewards(EXAMPLES)
    assert np.ptp(expected) > 0.3
    np.testing.assert_allclose(found["rew"], expected, atol=1e-5, rtol=0)


def test_answers_are_those_of_torch(unieval: UniEval) -> None:
    long = [*EXAMPLES, Example(LONG * 99, "", "Yes, and no.")]
    found, expected = unieval(long), reference_answers(long)
    assert list(found) == ["nat", "und", "coh"]
    for name, column in expected.items():
        assert found[name].dtype == np.float64
        assert np.ptp(column) > 0.01
        np.testing.assert_allclose(found[name], column, atol=1e-5, rtol=0, err_msg=name)


def test_order_and_company_change_nothing(oasst: OasstRewardModel, unieval: UniEval) -> None:
    for oracle in (oasst, unieval):
        together, turned = oracle(EXAMPLES), oracle(EXAMPLES[::-1])
        for name, column in together.items():
            np.testing.assert_allclose(turned[name][::-1], column, atol=1e-5, rtol=0)
            assert column[0] == column[-1], "equal examples are scored once"
            alone = oracle(EXAMPLES[2:3])[name]
            np.testing.assert_allclose(alone, column[2:3], atol=1e-5, rtol=0)
            assert oracle([])[name].shape == (0,)


def test_eight_devices_are_one(oasst: OasstRewardModel, unieval: UniEval) -> None:
    mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    many = (OasstRewardModel.load(neox_directory(), mesh), UniEval.load(t5_directory(), mesh))
    for alone, placed in zip((oasst, unieval), many, strict=True):
        for name, column in alone(EXAMPLES).items():
            np.testing.assert_allclose(placed(EXAMPLES)[name], column, atol=1e-5, rtol=0)


def test_bfloat16_holds_half_and_stays_near(
    oasst: OasstRewardModel, unieval: UniEval, one: jax.sharding.Mesh
) -> None:
    halves = (
        OasstRewardModel.load(neox_directory(), one, "bfloat16"),
        UniEval.load(t5_directory(), one, "bfloat16"),
    )
    for whole, half in zip((oasst, unieval), halves, strict=True):
        assert {x.dtype.name for x in jax.tree.leaves(half.params)} == {"bfloat16"}
        for name, column in whole(EXAMPLES).items():
            np.testing.assert_allclose(half(EXAMPLES)[name], column, atol=0.1, rtol=0)


def test_together_they_make_the_paper_s_reward(oasst: OasstRewardModel, unieval: UniEval) -> None:
    def oracle(examples: Any) -> dict[str, np.ndarray]:
        return oasst(examples) | unieval(examples)

    (judged,) = rewards.judge(oracle, [PARIS], [True], Reward())
    assert judged.components is not None and list(judged.components) == list(PAPER_COMPONENTS)
    c = judged.components
    by_hand = 0.0078 * c["rew"] - 0.4421 * c["und"] + 0.3212 * c["nat"] + 0.1520 * c["coh"] - 0.0274
    assert judged.reward == pytest.approx(by_hand, abs=1e-12)


# Directories that are not right


@pytest.fixture
def copies(tmp_path: Path) -> tuple[Path, Path]:
    """Of the reward model's directory and of UniEval's."""
    for name, source in (("neox", neox_directory()), ("t5", t5_directory())):
        shutil.copytree(source, tmp_path / name)
    return tmp_path / "neox", tmp_path / "t5"


def error_of(load: Callable[..., Any], folder: Path, mesh: jax.sharding.Mesh) -> str:
    with pytest.raises(ValueError) as error:
        load(folder, mesh)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_other_model_s_directory_is_refused(
    copies: tuple[Path, Path], one: jax.sharding.Mesh
) -> None:
    neox, t5 = copies
    assert error_of(OasstRewardModel.load, t5, one) == (
        f"{t5}/config.json: model_type='t5': expected one of ('gpt_neox', 'gpt_neox_reward_model')"
    )
    assert error_of(UniEval.load, neox, one) == (
        f"{neox}/config.json: model_type='gpt_neox_reward_model': expected 't5'"
    )
    shutil.rmtree(t5)
    assert error_of(UniEval.load, t5, one) == (
        f"{t5}/config.json: not found; expected a Hugging Face model directory"
    )


def test_a_directory_without_a_vocabulary_is_refused(
    copies: tuple[Path, Path], one: jax.sharding.Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would make one up."""
    for load, folder in zip((OasstRewardModel.load, UniEval.load), copies, strict=True):
        (folder / "tokenizer.json").unlink()
        assert error_of(load, folder, one) == (
            f"{folder}: no tokenizer; expected one of tokenizer.json, spiece.model, vocab.json"
        )
    t5 = copies[1]
    (t5 / "spiece.model").write_bytes(b"junk")
    monkeypatch.setattr(paper_oracles.importlib.util, "find_spec", lambda name: None)
    assert error_of(UniEval.load, t5, one) == (
        f'{t5}: reading spiece.model needs sentencepiece: pip install -e ".[oracles]"'
    )


def test_a_tokenizer_of_another_model_is_refused(
    copies: tuple[Path, Path], one: jax.sharding.Mesh
) -> None:
    neox, t5 = copies
    write_t5_tokenizer(neox)
    assert error_of(OasstRewardModel.load, neox, one) == (
        f"{neox}: <|prompter|> is not one token of the tokenizer; expected that of an "
        "OpenAssistant reward model"
    )
    write_neox_tokenizer(t5)
    assert error_of(UniEval.load, t5, one) == (f"{t5}: the tokenizer has 302 tokens, the model 160")
    write_t5_tokenizer(t5)
    tokenizer = json.loads((t5 / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = tokenizer["model"]["vocab"][:-2]
    (t5 / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert error_of(UniEval.load, t5, one) == (
        f"{t5}: the tokenizer begins Yes and No with the same token 3; expected that of a UniEval "
        "model"
    )


def test_a_directory_s_own_code_is_not_run(
    copies: tuple[Path, Path], one: jax.sharding.Mesh
) -> None:
    """`auto_map` names a tokenizer of the directory, in Python."""
    ran = copies[0].parent / "ran"
    for load, folder in zip((OasstRewardModel.load, UniEval.load), copies, strict=True):
        (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
        for name in ("tokenizer_config.json", "config.json"):
            raw = json.loads((folder / name).read_text())
            classes = {"AutoTokenizer": ["own.Own", "own.Own"], "AutoConfig": "own.Own"}
            (folder / name).write_text(json.dumps(raw | {"auto_map": classes}))
        try:
            load(folder, one)
        except ValueError as error:
            assert "\n" not in str(error)
        assert not ran.exists()
