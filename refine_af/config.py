"""Configuration of a run: frozen dataclasses, validated when they are made.

Experiments are files in `configs/` whose `get_config()` returns an `Experiment`. Values marked
[U] are defaults of this project where the paper (arXiv 2505.06548) does not say its own.
"""

import dataclasses
import hashlib
import json
import math
import re
import warnings

from refine_af.models.config import DECODE_KERNELS
from refine_af.validation import require, require_at_least, require_one_of, require_positive

DTYPES = ("float32", "bfloat16")
TRACKS = ("default", "xlingual")  # of Super-NaturalInstructions: English, cross-lingual
PROMPT_FORMATS = ("raw", "chat")  # as it is; as the user's turn of a chat
SFT_FORMATS = ("alpaca", "chat")
# What the backward pass computes again of a layer: nothing, all but linear maps, all.
REMATS = ("none", "cheap", "full")
TRAINED = ("lora", "full")
CRITICS = ("shared", "separate")
OPTIMIZERS = ("adam", "adafactor")  # adafactor: second moments as rows and columns
SCHEDULES = ("linear", "cosine", "constant")
TRACKERS = ("tensorboard", "wandb")
ESTIMATORS = ("gae", "rloo", "grpo")
KL_CONTROLLERS = ("adaptive", "fixed")
NORMALISATIONS = ("none", "batch")  # as they are; mean 0 and deviation 1 over the batch's answers
FLOORS = ("unreadable", "dropped")  # answers without an output; and copies, and what ends in ":"
FILTERS = ("none", "reward", "share")  # rows with so much reward; the best share of the rows
PAPER_COMPONENTS = ("rew", "nat", "und", "coh")
_NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
_LEAST_TEMPERATURE = 1e-4  # below, logits divided by it overflow
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")  # of a block, by the names of models.layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The base model; `source` is anything that `--model` takes."""

    source: str
    dtype: str  # of activations, one of DTYPES
    param_dtype: str  # of the frozen base weights, one of DTYPES
    decode_kernel: str = "xla"  # of attention to a cache, one of DECODE_KERNELS
    draft_tokens: int = 0  # guessed and read along for each token that is drawn

    def __post_init__(self) -> None:
        """Validate."""
        require_one_of("model.dtype", self.dtype, DTYPES)
        require_one_of("model.decode_kernel", self.decode_kernel, DECODE_KERNELS)
        require_one_of("model.param_dtype", self.param_dtype, DTYPES)
        require_at_least(0, self, "model.", "draft_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters; see `models.config.LoraConfig`."""

    rank: int = 16
    alpha: float = 32.0
    pattern: str = "|".join(LINEARS)

    def __post_init__(self) -> None:
        """Validate."""
        require_at_least(1, self, "lora.", "rank")
        require_positive(self, "lora.", "alpha")
        where = f"lora.pattern={self.pattern!r}: expected a regular expression"
        try:
            with warnings.catch_warnings():  # of what it may mean one day
                warnings.simplefilter("ignore", FutureWarning)
                found = any(re.fullmatch(self.pattern, name) for name in LINEARS)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{where} ({error})") from None
        require(found, f"{where} that is, in full, one of {LINEARS}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How text is drawn; temperature 0 is greedy."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0  # share of the most likely token's probability that others need; 0: none
    presence_penalty: float = 0.0  # subtracted from the logit of every token already generated
    repetition_penalty: float = 1.0  # divides the logit of every token of prompt and answer; 1: off
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # besides the model's end tokens

    def __post_init__(self) -> None:
        """Validate."""
        for name in ("temperature", "presence_penalty", "repetition_penalty"):
            value = getattr(self, name)
            require(math.isfinite(value), f"{name}={value}: expected a finite number")
        require(
            self.temperature == 0 or self.temperature >= _LEAST_TEMPERATURE,
            f"temperature={self.temperature}: expected 0 or at least {_LEAST_TEMPERATURE}",
        )
        require(0 < self.top_p <= 1, f"top_p={self.top_p}: expected in (0, 1]")
        require(0 <= self.min_p <= 1, f"min_p={self.min_p}: expected in [0, 1]")
        require_positive(self, "", "repetition_penalty")
        require_at_least(0, self, "", "top_k")
        require_at_least(1, self, "", "max_new_tokens")
        require("" not in self.stop, f"stop={self.stop}: expected strings that are not empty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instructions:
    """Stage 1, Self-Instruct (arXiv 2212.10560)."""

    num_instructions: int  # accepted ones to stop at
    max_batches: int  # give up after so many batches of prompts
    batch_size: int  # prompts a batch
    num_seed_demos: int = 6
    num_generated_demos: int = 2
    classification_share: float = 0.25  # of the prompts that ask for classification tasks [U]
    max_similarity: float = 0.7  # ROUGE-L F with the pool; exactly this much is kept
    sampling: Sampling

    def __post_init__(self) -> None:
        """Validate."""
        counts = ("num_instructions", "max_batches", "batch_size")
        require_at_least(1, self, "instructions.", *counts)
        require_at_least(0, self, "instructions.", "num_seed_demos", "num_generated_demos")
        require(
            0 <= self.classification_share <= 1,
            f"instructions.classification_share={self.classification_share}: expected in [0, 1]",
        )
        require(
            0 < self.max_similarity <= 1,
            f"instructions.max_similarity={self.max_similarity}: expected in (0, 1]",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """The instance-writing prompt of stages 2 and 3."""

    format: str  # one of PROMPT_FORMATS
    num_demos: int  # seed tasks shown before the instruction
    max_demo_chars: int  # only demos up to this length are shown
    accept_unmarked_output: bool  # text without "Output:" counts as the output of an empty input

    def __post_init__(self) -> None:
        """Validate."""
        require_one_of("prompts.format", self.format, PROMPT_FORMATS)
        require_at_least(0, self, "prompts.", "num_demos")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
    """r = rew*Rew + und*Und + nat*Nat + coh*Coh + bias (InstructMining, arXiv 2307.06290).

    Components are first normalised, then clipped, then summed; the sum is clipped.
    """

    oracle: str = "judge"  # gives the components, see `refine_af.oracles`; several with commas
    rew: float = 0.0078
    und: float = -0.4421
    nat: float = 0.3212
    coh: float = 0.1520
    bias: float = -0.0274
    others: tuple[str, ...] = ()  # "name=coefficient" of components of other oracles
    normalise: str = "none"  # one of NORMALISATIONS
    clip_components: float = 0.0  # largest magnitude of each component; 0: no limit
    clip_reward: float = 0.0  # and of their sum; 0: no limit
    floor: str = "dropped"  # one of FLOORS: answers whose reward is `unparsable` [U]
    unparsable: float = -1.0  # whatever the oracle would say [U]
    missing_end_penalty: float = 0.5  # subtracted when the answer was cut by length [U]
    cache: str = ""  # file of scores to be used again, by content; empty: the run's own
    timeout: float = 60.0  # seconds that an HTTP oracle has for an answer

    def __post_init__(self) -> None:
        """Validate."""
        require_one_of("reward.normalise", self.normalise, NORMALISATIONS)
        require_one_of("reward.floor", self.floor, FLOORS)
        numbers = ("rew", "nat", "und", "coh", "bias", "unparsable", "missing_end_penalty")
        for name in (*numbers, "clip_components", "clip_reward", "timeout"):
            value = getattr(self, name)
            require(math.isfinite(value), f"reward.{name}={value}: expected a finite number")
        require_at_least(0, self, "reward.", "clip_components", "clip_reward")
        require_positive(self, "reward.", "timeout")
        names = [item.partition("=")[0] for item in self.others]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"reward.others: {twice} stand there more than once")
        for item in self.others:
            name, _, number = item.partition("=")
            fits = name.isidentifier() and re.fullmatch(_NUMBER, number) is not None
            require(
                fits and name not in PAPER_COMPONENTS,
                f"reward.others: {item!r}: expected name=coefficient, and a name that is none of "
                f"{PAPER_COMPONENTS}",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ppo:
    """Stage 2, proximal policy optimisation (arXiv 1707.06347)."""

    num_steps: int  # rollouts
    batch_size: int  # answers a rollout
    trained: str = "lora"  # one of TRAINED: an adapter on frozen weights, or all weights
    critic: str = "shared"  # one of CRITICS: a head on the policy's trunk, or on one of its own
    critic_warmup: int = 0  # first steps that train nothing but the critic
    optimizer: str = "adam"  # one of OPTIMIZERS
    estimator: str = "gae"  # of advantages, one of ESTIMATORS; all but gae do without the critic
    group_size: int = 1  # answers to each instruction of a rollout
    num_epochs: int
    num_minibatches: int  # optimizer steps an epoch
    num_microbatches: int  # a minibatch is cut into so many to save memory; changes no number
    remat: str = "full"  # one of REMATS
    row_length: int = 0  # columns that texts are packed into; the longest text's where that is more
    learning_rate: float
    warmup_steps: int  # optimizer steps of linear warm-up
    schedule: str = "linear"  # one of SCHEDULES: how the learning rate falls to 0 afterwards
    max_grad_norm: float = 1.0
    adam_eps: float = 1e-5
    gamma: float = 1.0  # of gae
    gae_lambda: float = 0.95
    clip_eps: float = 0.2
    dual_clip: float = 0.0  # most that a bad token counts, in advantages; above 1, or 0: no limit
    max_update_kl: float = 0.0  # no more optimizer steps once one moved so far; 0: no limit
    value_clip_eps: float = 0.2
    value_coef: float = 0.1  # of gae
    entropy_coef: float = 0.0
    kl_coef: float = 0.1  # of the adaptive controller: at the start
    kl_controller: str = "adaptive"  # one of KL_CONTROLLERS
    kl_target: float = 6.0  # summed over an answer, nats; of the adaptive controller
    kl_horizon: int = 10_000  # answers
    scale_scores: bool = False  # to mean 0 and deviation 1 over all rollouts so far
    whiten_rewards: bool = False  # of gae: token rewards to deviation 1 in a rollout, mean kept
    whiten_advantages: bool = True  # of gae
    checkpoint_every: int  # steps
    keep_checkpoints: int = 2
    num_eval_prompts: int = 0  # instructions kept from training, to measure the reward on
    num_eval_samples: int = 4  # answers to each of them
    eval_every: int = 0  # steps between looks at one answer to each of them; 0: none
    keep_best: bool = False  # keep the best of these looks, too, and let later stages take that one
    sample_ahead: bool = False  # while a server or function scores a rollout, sample the next one
    trackers: tuple[str, ...] = ("tensorboard",)  # of TRACKERS
    int8_weights: bool = False  # of rollouts; their drift is `drift/logprob_max` in the metrics
    int8_cache: bool = False  # of rollouts
    lora: Lora
    sampling: Sampling

    def __post_init__(self) -> None:
        """Validate."""
        counts = ("num_steps", "batch_size", "num_epochs", "num_minibatches", "num_microbatches")
        require_at_least(1, self, "ppo.", *counts)
        require_at_least(1, self, "ppo.", "kl_horizon", "checkpoint_every", "keep_checkpoints")
        require_at_least(0, self, "ppo.", "warmup_steps", "value_coef", "entropy_coef", "kl_coef")
        require_at_least(0, self, "ppo.", "row_length", "max_update_kl")
        require_one_of("ppo.trained", self.trained, TRAINED)
        require_one_of("ppo.critic", self.critic, CRITICS)
        require_one_of("ppo.optimizer", self.optimizer, OPTIMIZERS)
        require_at_least(0, self, "ppo.", "critic_warmup", "eval_every")
        require_one_of("ppo.remat", self.remat, REMATS)
        require_one_of("ppo.schedule", self.schedule, SCHEDULES)
        for tracker in self.trackers:
            require_one_of("ppo.trackers", tracker, TRACKERS)
        require_one_of("ppo.estimator", self.estimator, ESTIMATORS)
        require_one_of("ppo.kl_controller", self.kl_controller, KL_CONTROLLERS)
        least = 1 if self.estimator == "gae" else 2
        require(
            self.group_size >= least and self.batch_size % self.group_size == 0,
            f"ppo.group_size={self.group_size}: expected a divisor of batch_size="
            f"{self.batch_size}, at least {least} for {self.estimator}",
        )
        require(
            self.estimator == "gae" or not self.whiten_rewards,
            f"ppo.whiten_rewards=True: {self.estimator} has no token rewards",
        )
        require(
            self.estimator == "gae" or (self.critic == "shared" and self.critic_warmup == 0),
            f"ppo.critic={self.critic}, critic_warmup={self.critic_warmup}: {self.estimator} has "
            "no critic, expected shared and 0",
        )
        require(
            self.critic_warmup < self.num_steps,
            f"ppo.critic_warmup={self.critic_warmup}: expected below num_steps={self.num_steps}",
        )
        require(
            self.kl_controller == "fixed" or self.kl_coef > 0,
            f"ppo.kl_coef={self.kl_coef}: the adaptive controller multiplies it; expected above 0, "
            "or kl_controller=fixed",
        )
        require(
            self.kl_controller == "fixed" or self.batch_size < 5 * self.kl_horizon,
            f"ppo.kl_horizon={self.kl_horizon}: a step could turn kl_coef negative; expected above "
            f"a fifth of batch_size={self.batch_size}",
        )
        require(
            not (self.sample_ahead and self.max_update_kl),
            "ppo.sample_ahead=True: its answers are of the policy one step back, which "
            "max_update_kl takes for one that has moved; set one of them to False or 0",
        )
        require(
            self.dual_clip == 0 or self.dual_clip > 1,
            f"ppo.dual_clip={self.dual_clip}: expected 0 or above 1",
        )
        sizes = ("learning_rate", "max_grad_norm", "adam_eps", "clip_eps", "value_clip_eps")
        require_positive(self, "ppo.", *sizes, "kl_target")
        require_at_least(1, self, "ppo.", "num_eval_samples")
        require(
            self.num_eval_prompts == 0 or self.num_eval_prompts > 1,
            f"ppo.num_eval_prompts={self.num_eval_prompts}: expected 0 or at least 2",
        )
        require(
            not self.eval_every or self.num_eval_prompts > 0,
            f"ppo.eval_every={self.eval_every}: needs num_eval_prompts, instructions to measure on",
        )
        require(
            self.eval_every > 0 or not self.keep_best,
            "ppo.keep_best=True: needs ppo.eval_every above 0",
        )
        pieces = self.num_minibatches * self.num_microbatches
        require(
            self.batch_size % pieces == 0,
            f"ppo.batch_size={self.batch_size}: must be a multiple of num_minibatches*"
            f"num_microbatches={pieces}",
        )
        require(0 <= self.gamma <= 1, f"ppo.gamma={self.gamma}: expected in [0, 1]")
        require(0 <= self.gae_lambda <= 1, f"ppo.gae_lambda={self.gae_lambda}: expected in [0, 1]")
        require(self.sampling.temperature > 0, "ppo.sampling.temperature: PPO must sample, use > 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instances:
    """Stage 3: the tuned model writes the pairs."""

    batch_size: int
    answers_per_instruction: int  # samples drawn for each
    max_per_instruction: int = 5  # kept for each
    score: bool = True  # every pair that is kept, by the oracle of stage 2
    sampling: Sampling

    def __post_init__(self) -> None:
        """Validate."""
        counts = ("batch_size", "answers_per_instruction", "max_per_instruction")
        require_at_least(1, self, "instances.", *counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """What of the instances becomes the data set, on which the base model is fine-tuned."""

    license: str = "other"  # of the card, as the hub spells it
    filter: str = "none"  # by the rows' reward, one of FILTERS
    filter_at: float = 0.0  # the least reward, or the share
    others: tuple[str, ...] = ()  # files of other sets; what they ask for is left out
    max_similarity: float = 0.7  # ROUGE-L F with what the other sets ask for

    def __post_init__(self) -> None:
        """Validate."""
        require_one_of("dataset.filter", self.filter, FILTERS)
        require(
            self.filter != "share" or 0 < self.filter_at <= 1,
            f"dataset.filter_at={self.filter_at}: expected a share in (0, 1]",
        )
        require(
            self.filter != "none" or self.filter_at == 0,
            f"dataset.filter_at={self.filter_at}: needs dataset.filter, 'reward' or 'share'",
        )
        require(
            0 < self.max_similarity <= 1,
            f"dataset.max_similarity={self.max_similarity}: expected in (0, 1]",
        )
        require(
            re.fullmatch("[a-z0-9.+-]+", self.license) is not None,
            f"dataset.license={self.license!r}: expected one of the hub's names, as apache-2.0",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft:
    """Fine-tuning of the base model on the data set, loss on the response only."""

    format: str  # one of SFT_FORMATS
    trained: str = "lora"  # one of TRAINED: an adapter on frozen weights, or all weights
    num_epochs: int
    batch_size: int  # examples; packed into rows
    num_microbatches: int  # at most; each of batch_size / num_microbatches rows; changes no number
    remat: str = "full"  # one of REMATS
    learning_rate: float
    warmup_share: float = 0.03  # of all steps; cosine decay to 0 afterwards (Alpaca)
    max_grad_norm: float = 1.0
    max_length: int  # tokens; longer examples are left out
    eval_share: float = 0.1  # of the examples, held out for the loss
    checkpoint_every: int  # steps
    keep_checkpoints: int = 2  # the newest; were one damaged, the one before it would be used
    keep_best: bool = False  # keep the epoch of the lowest held-out loss, too, and export that one
    lora: Lora

    def __post_init__(self) -> None:
        """Validate."""
        require_one_of("sft.format", self.format, SFT_FORMATS)
        require_one_of("sft.trained", self.trained, TRAINED)
        require_one_of("sft.remat", self.remat, REMATS)
        counts = ("num_epochs", "batch_size", "num_microbatches", "max_length", "checkpoint_every")
        require_at_least(1, self, "sft.", *counts, "keep_checkpoints")
        require(
            self.eval_share > 0 or not self.keep_best,
            "sft.keep_best=True: needs sft.eval_share above 0",
        )
        require_positive(self, "sft.", "learning_rate", "max_grad_norm")
        require(
            self.batch_size % self.num_microbatches == 0,
            f"sft.batch_size={self.batch_size}: must be a multiple of num_microbatches="
            f"{self.num_microbatches}",
        )
        require(
            0 <= self.warmup_share <= 1, f"sft.warmup_share={self.warmup_share}: expected in [0, 1]"
        )
        require(0 <= self.eval_share < 1, f"sft.eval_share={self.eval_share}: expected in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Super-NaturalInstructions scores, as in Tk-Instruct (arXiv 2204.07705)."""

    tasks: str = ""  # directory of task files; empty: the bundled ones
    split: str = ""  # file with a task name a line; empty: all tasks in the directory
    track: str = "default"  # one of TRACKS: what counts as a word in ROUGE-L
    num_examples: int  # demonstrations in the prompt
    max_instances: int = 100  # of each task
    max_source_tokens: int = 1024
    format: str  # one of PROMPT_FORMATS
    batch_size: int
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        """Validate."""
        require_one_of("evaluation.format", self.format, PROMPT_FORMATS)
        require_one_of("evaluation.track", self.track, TRACKS)
        require_at_least(0, self, "evaluation.", "num_examples")
        counts = ("max_instances", "max_source_tokens", "batch_size", "max_new_tokens")
        require_at_least(1, self, "evaluation.", *counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices along each axis; the product must be the number of devices (-1: the rest)."""

    data: int = 1
    fsdp: int = -1
    sequence: int = 1  # columns of long texts, in training and scoring
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A whole run."""

    seed: int
    seed_tasks: str = ""  # JSONL file; empty: the bundled 175
    model: Model
    mesh: Mesh
    instructions: Instructions
    prompts: Prompts
    reward: Reward
    ppo: Ppo
    instances: Instances
    dataset: DataSet = DataSet()
    sft: Sft
    evaluation: Evaluation

    def __post_init__(self) -> None:
        """Validate."""
        require_at_least(0, self, "", "seed")
        total = self.instructions.num_instructions
        require(
            self.ppo.num_eval_prompts < total,
            f"ppo.num_eval_prompts={self.ppo.num_eval_prompts}: must be below "
            f"instructions.num_instructions={total}, or nothing is left to train on",
        )
        require(
            self.dataset.filter == "none" or self.instances.score,
            f"dataset.filter={self.dataset.filter!r}: needs instances.score, the rows' reward",
        )
        require(
            self.model.decode_kernel == "xla" or not self.ppo.int8_cache,
            "model.decode_kernel='pallas' and ppo.int8_cache exclude each other",
        )


def config_hash(config: Experiment) -> str:
    """Sixteen hex digits that change with any field but those of the mesh.

    A run may go on with other devices: its numbers are then the same but for rounding.
    """
    values = dataclasses.asdict(config)
    del values["mesh"]
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
