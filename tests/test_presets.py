"""Full-size presets by their shapes alone."""

import math

import jax
import pytest

from refine_af.models import hf_config, transformer
from refine_af.models.registry import PRESETS
from refine_af.models.weights import expected_shapes, flat

# As published with the models; a tied head counts once.
COUNTS = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,  # from here on without the image encoder
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
    "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
    "deepseek-r1-distill-qwen-7b": 7_615_616_512,
    "deepseek-r1-distill-qwen-14b": 14_770_033_664,
    "deepseek-r1-distill-qwen-32b": 32_763_876_352,
    "deepseek-r1-distill-llama-8b": 8_030_261_248,
    "deepseek-r1-distill-llama-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "tiny": 26_912,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_its_published_number_of_parameters(preset: str) -> None:
    config = PRESETS[preset]
    made = jax.eval_shape(lambda: transformer.init(config, key=jax.random.key(0)))[0]
    assert sum(leaf.size for leaf in jax.tree.leaves(made)) == COUNTS[preset]
    shapes = expected_shapes(config)
    assert {path: leaf.shape for path, leaf in flat(made)} == shapes
    assert sum(map(math.prod, shapes.values())) == COUNTS[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_survives_its_config_json(preset: str) -> None:
    config = PRESETS[preset]
    raw = hf_config.to_raw(config, eos_ids=(2,))
    again = hf_config.parse(raw, preset, dtype=config.dtype, param_dtype=config.param_dtype)
    assert again == config
