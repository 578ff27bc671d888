"""Requests in, completions out: continuous batching over slots that decode together.

A free slot takes the next request from the queue: prompts are packed and read together, a long one
in pieces, a beginning that most of them share only once. Then all slots decode in one loop on the
device, until one is done and another request waits. Stop tokens are seen on the device; stop
strings, which are a matter of text, on the host between two such loops.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from transformers import PreTrainedTokenizerBase

from refine_af import drafting, memory, packing, sampling
from refine_af.mesh import shard_slots
from refine_af.models import processes
from refine_af.models.cache import KVCache, Prefix
from refine_af.models.config import ModelConfig
from refine_af.models.transformer import Params, define
from refine_af.requests import Answer, Completion, Request, TokenIds
from refine_af.sampling import CHUNK, Chosen, Limits, Needs, Pack

_TEXT_CHUNK = 16  # tokens between two looks for stop strings; with guesses twice as many, at most
_LEAST_PLACES = 64  # of a cache
_NO_LIMIT = 1 << 30  # tokens; more than any vocabulary has
_SHRINK = 4  # the batch is cut to a quarter when no more answers are left, or to a quarter of that
# One slot in so many is free before prompts are read: several together take less time each.
_SLOTS_PER_WAKE = 16
_COLUMNS_PER_PROMPT = 32  # of a pack

Progress = Callable[[int], None]  # called with the number of new tokens
Finished = Iterator[tuple[int, Completion]]  # with the number of the request


@dataclasses.dataclass(frozen=True)
class Engine:
    """A decoder ready to sample; parameters are given to each call, never kept.

    Attributes:
        config: of the model whose (unstacked) parameters `generate` is given.
        num_slots: answers that are written at the same time, at most.
        max_read: prompt tokens that are read in one go.
        cache_budget: bytes that caches may take on a device; None: what is free.
        longest_text: tokens of the longest text of many calls; caches that need more than half as
            many places have as many, so that calls share programs. 0: not known.
        draft_tokens: guessed for each slot and read along (`drafting`), at most `drafting.MOST`.
    """

    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase | None  # None: completions have no text
    mesh: jax.sharding.Mesh
    eos_ids: TokenIds
    num_slots: int
    max_read: int = 512
    cache_budget: int | None = None
    longest_text: int = 0
    draft_tokens: int = 0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: `draft_tokens` is out of range, or the decode kernel takes none.
        """
        drafting.check(self.draft_tokens, self.config)

    def generate(
        self,
        params: Params,
        requests: Sequence[Request],
        progress: Progress | None = None,
        finished: Callable[[int, Completion], object] | None = None,
    ) -> list[Completion]:
        """Completions in the order of the requests.

        Args:
            finished: called with the number and the completion of each request that is done.

        Raises:
            ValueError: a request has a fault, or the caches do not fit into memory.
        """
        for number, request in enumerate(requests):
            fault = self.fault(request)
            if fault:
                raise ValueError(f"request {number}: {fault}")
        found = {}
        for number, completion in self.stream(params, requests, progress):
            found[number] = completion
            if finished:
                finished(number, completion)
        return [found[i] for i in range(len(requests))]

    def stream(
        self, params: Params, requests: Sequence[Request], progress: Progress | None = None
    ) -> Finished:
        """(number of the request, completion), as they finish; those with a fault come first.

        Raises:
            ValueError: the caches do not fit into memory.
        """
        answers = []
        for number, request in enumerate(requests):
            fault = self.fault(request)
            if fault:
                yield number, Completion("", (), (), (), "error", fault)
                continue
            room = self.config.max_positions - len(request.prompt_ids)
            budget = min(request.sampling.max_new_tokens, room)
            answers.append(Answer(number, request, budget, self.eos_ids, self.tokenizer))
        if answers:
            yield from _Run(self, params, answers, progress).finish()

    def fault(self, request: Request) -> str:
        """What keeps a request from being answered, "" if nothing does."""
        length, vocab = len(request.prompt_ids), self.config.vocab_size
        if length == 0:
            return "the prompt is empty"
        if length >= self.config.max_positions:
            return (
                f"the prompt has {length} tokens, and the model's context is "
                f"{self.config.max_positions}; shorten it"
            )
        if request.sampling.stop and self.tokenizer is None:
            return "stop strings need a tokenizer, and this model has none; give stop_token_ids"
        for name, ids in (
            ("the prompt", request.prompt_ids),
            ("stop_token_ids", request.sampling.stop_token_ids),
        ):
            odd = next((i for i in ids if not 0 <= i < vocab), None)
            if odd is not None:
                return f"token id {odd} in {name}: expected 0 to {vocab - 1}"
        return ""


class _Run:
    """All answers of one call on their way through the slots."""

    def __init__(
        self, engine: Engine, params: Params, answers: list[Answer], progress: Progress | None
    ) -> None:
        self.engine = engine
        self.params = params
        self.progress = progress
        self.definition = define(engine.config, stacked=False)
        self.needs = _needs(answers)
        self.num_stops = packing.power_of_two(max(len(a.stop_ids) for a in answers))
        self.steps = _TEXT_CHUNK if any(a.request.sampling.stop for a in answers) else CHUNK
        if engine.draft_tokens:
            self.steps *= 2  # columns of a loop, not all of which are kept
        shared = packing.shared_prefix([a.request.prompt_ids for a in answers])
        for answer in answers:
            if shared and len(answer.own) > len(shared) and answer.own[: len(shared)] == shared:
                answer.own, answer.offset = answer.own[len(shared) :], len(shared)
        self.num_shared = len(shared)
        longest = min(engine.longest_text, engine.config.max_positions)
        self.common_places = _bucket([longest - len(shared)])
        num_slots = self._affordable_slots(answers, len(shared))
        # Long ones first: what is left for the end is short.
        self.queue = collections.deque(sorted(answers, key=lambda a: -a.budget))
        self.live: dict[int, Answer] = {}  # by slot
        self.places = self._places(*self._spans(list(self.queue)[:num_slots]))
        self.slots = sampling.jit_empty(
            self.definition, engine.mesh, num_slots, self.places, self.num_stops, self.needs
        )
        self.prefix = self._read_prefix(shared) if shared else None

    def finish(self) -> Finished:
        """Fill the slots, decode, fill again, until all answers are whole."""
        while self.queue or self.live:
            yield from self._admit()
            if self.live:
                yield from self._decode()

    @property
    def num_slots(self) -> int:
        return self.slots.token.shape[0]

    # Memory

    def _affordable_slots(self, answers: Sequence[Answer], prefix_length: int) -> int:
        """Slots whose caches fit into memory, as many as are asked for if possible."""
        engine = self.engine
        parts = engine.mesh.shape["data"]
        wanted = min(packing.power_of_two(len(answers)), engine.num_slots)
        longest = max(prefix_length, *(len(a.own) for a in answers))
        whole = _bucket(len(a.own) + a.budget for a in answers)
        return memory.affordable_slots(
            engine.config,
            engine.mesh,
            wanted=-(-wanted // parts) * parts,
            length=self._places(whole, whole),
            tail_length=drafting.PLACES if engine.draft_tokens else 0,
            prefix_length=prefix_length,
            scratch_length=self._room(longest) if longest > engine.max_read or prefix_length else 0,
            free=engine.cache_budget,
        )

    def _spans(self, answers: Sequence[Answer]) -> tuple[int, int]:
        """Places that these answers' next tokens take, and those that all of their tokens take."""
        soon, whole = (
            _bucket(a.columns + min(a.left, most) for a in answers)
            for most in (self.steps, _NO_LIMIT)
        )
        return soon, whole

    def _places(self, soon: int, whole: int) -> int:
        """Places of a cache for answers with these spans.

        So that few sizes occur, each of which is a program, they are those of all tokens, or of the
        longest text of all calls, where that is at most twice what the next tokens take.
        """
        return max(n for n in (soon, whole, self.common_places) if n <= 2 * soon)

    def _fit(self, answers: Sequence[Answer]) -> None:
        """Grow the cache when these answers need it, shrink it when half would do to their end."""
        soon, whole = self._spans(answers)
        wanted = self._places(soon, whole)
        if soon > self.places or 2 * max(wanted, whole) <= self.places:
            self.places = wanted
            self.slots = sampling.jit_resize(self.definition, self.slots, wanted)

    # Reading prompts

    def _admit(self) -> Finished:
        """Give waiting requests to free slots; some end with their first token."""
        while self.queue and len(self.live) < self.num_slots:
            free = [slot for slot in range(self.num_slots) if slot not in self.live]
            waiting = [self.queue.popleft() for _ in free[: len(self.queue)]]
            self._fit([*self.live.values(), *waiting])
            while waiting:
                count = self._read(waiting, free)
                yield from self._settle(dict(zip(free, waiting[:count], strict=False)))
                waiting, free = waiting[count:], free[count:]

    def _settle(self, answers: dict[int, Answer]) -> Finished:
        """Of the answers with new tokens, by slot: those that are whole leave, the others stay."""
        for slot, answer in answers.items():
            completion = answer.completion()
            if completion is None:
                self.live[slot] = answer
            else:
                self.live.pop(slot, None)
                yield answer.number, completion

    def _read(self, waiting: Sequence[Answer], free: Sequence[int]) -> int:
        """Read the prompts of the first ones and put them into slots; returns how many."""
        most = self.engine.max_read
        scratch = None
        if len(waiting[0].own) > most:
            answers = waiting[:1]
            scratch, pack = self._read_pieces(waiting[0])
        else:
            short = list(itertools.takewhile(lambda a: len(a.own) <= most, waiting))
            rows, num_rows, count = packing.pack([(a.own, a.offset) for a in short], most)
            answers = short[:count]
            places = [rows.places[a.own, a.offset] for a in answers]
            pack = self._pack(
                rows.arrays(num_rows), places, answers, self._prompts(rows, num_rows, count)
            )
        slots = _repeated(free[: len(answers)], np.int32, pack.row.shape[0])
        pack = pack._replace(slot=slots)
        found = sampling.jit_read(
            self.definition, self.params, pack, self.prefix, scratch, self.needs
        )
        self.slots = sampling.jit_place(self.slots, pack, found)
        token, logprob, full = (x[:, None] for x in processes.to_host(found.chosen))
        for i, answer in enumerate(answers):
            answer.take(token[i], logprob[i], full[i])
        self._count(len(answers))
        return len(answers)

    def _pack(
        self,
        arrays: tuple[np.ndarray, np.ndarray, np.ndarray],
        places: Sequence[tuple[int, int]],
        answers: Sequence[Answer],
        size: int,
    ) -> Pack:
        """Answers' prompts, which begin at these (row, column), for the sampler.

        Args:
            size: prompts that the program takes.
        """
        lasts = [column + len(a.own) - 1 for (_, column), a in zip(places, answers, strict=True)]
        ids, start, offset = map(jnp.asarray, arrays)
        return Pack(
            tokens=ids,
            start=start,
            offset=offset,
            row=_repeated([row for row, _ in places], np.int32, size),
            first=_repeated([column for _, column in places], np.int32, size),
            last=_repeated(lasts, np.int32, size),
            prefixed=_repeated([a.offset for a in answers], np.int32, size),
            slot=jnp.zeros((size,), jnp.int32),
            seen=self._seen(answers, size),
            limits=_limits(answers, size, self.num_stops),
            num_prompts=jnp.int32(len(answers)),
        )

    def _prompts(self, rows: packing.Rows, num_rows: int, count: int) -> int:
        """Prompts that the program for such a pack takes: by its columns, or for all slots."""
        all_slots = packing.power_of_two(self.num_slots)
        usual = min(max(num_rows * rows.length // _COLUMNS_PER_PROMPT, 1), all_slots)
        return usual if count <= usual else all_slots

    def _seen(self, answers: Sequence[Answer], size: int) -> Array:
        """Tokens of each prompt, for the repetition penalty."""
        vocab = self.engine.config.vocab_size if self.needs.penalised else 0
        seen = np.zeros((size, vocab), np.uint8)
        if vocab:
            for i, answer in enumerate(answers):
                seen[i, list(answer.request.prompt_ids)] = sampling.IN_PROMPT
        return jnp.asarray(seen)

    def _read_pieces(self, answer: Answer) -> tuple[KVCache, Pack]:
        """All pieces of a long prompt but the last one, and that one."""
        *pieces, last = pieces_of(answer.own, self.engine.max_read)
        padding = (len(pieces) + 1) * len(last) - len(answer.own)
        scratch = self._extend(pieces, len(pieces) + 1, padding, answer.offset)
        start, offset = (np.full((1, len(last)), x, np.int32) for x in (padding, answer.offset))
        return scratch, self._pack((last[None], start, offset), [(0, padding)], [answer], 1)

    def _read_prefix(self, ids: TokenIds) -> Prefix:
        pieces = pieces_of(ids, self.engine.max_read)
        padding = len(pieces) * len(pieces[0]) - len(ids)
        scratch = self._extend(pieces, len(pieces), padding, None)
        return sampling.jit_prefix(self.definition, scratch, len(ids))

    def _room(self, length: int) -> int:
        """Columns of a cache into which a prompt of `length` tokens can be read in pieces."""
        most = self.engine.max_read
        return packing.bucket(-(-length // most), 1) * most

    def _extend(
        self, pieces: Sequence[np.ndarray], total: int, padding: int, offset: int | None
    ) -> KVCache:
        """A cache of one row, with room for `total` pieces, in which these have been read.

        Args:
            offset: length of the shared prefix before them; None: it is not there yet.
        """
        scratch = sampling.jit_scratch(self.definition, self._room(total * self.engine.max_read))
        for piece in pieces:
            scratch = sampling.jit_extend(
                self.definition,
                self.params,
                scratch,
                piece[None],
                np.asarray([padding], np.int32),
                None if offset is None else self.prefix,
                np.asarray([offset or 0], np.int32),
            )
            self._count(0)
        return scratch

    # Writing answers

    def _decode(self) -> Finished:
        """Draw some tokens for all live answers."""
        self._shrink()
        self._fit(list(self.live.values()))
        idle = np.asarray([slot not in self.live for slot in range(self.num_slots)])
        awaited = min(max(1, self.num_slots // _SLOTS_PER_WAKE), len(self.queue))
        wake = int(idle.sum()) + awaited if self.queue else self.num_slots
        slots = self.slots._replace(done=shard_slots(self.engine.mesh, idle))
        self.slots, found = self._loop(slots, np.int32(wake))
        drawn, (token, logprob, full) = processes.to_host((self.slots.drawn, found))
        total = 0
        for slot, answer in self.live.items():
            new = drawn[slot] - len(answer.ids)
            answer.take(token[slot, :new], logprob[slot, :new], full[slot, :new])
            total += int(new)
        self._count(total)
        yield from self._settle(dict(self.live))

    def _loop(self, slots: sampling.Slots, wake: np.int32) -> tuple[sampling.Slots, Chosen]:
        """(slots, their new tokens) after one loop on the device, with guesses or without."""
        model, rest = (self.definition, self.params, slots), (self.prefix, self.needs)
        count = self.engine.draft_tokens
        if not count:
            return sampling.jit_decode(*model, *rest, np.int32(self.steps), wake)
        texts = shard_slots(self.engine.mesh, self._texts())
        calls = np.int32(self.steps // (count + 1))
        return drafting.jit_decode(*model, texts, *rest, count, calls, wake)

    def _texts(self) -> np.ndarray:
        """Prompt and answer of each slot so far, [slots, L] with -1 before them."""
        texts = np.full((self.num_slots, self.num_shared + self.places), -1, np.int32)
        for slot, answer in self.live.items():
            text = *answer.request.prompt_ids, *answer.ids
            texts[slot, texts.shape[1] - len(text) :] = text
        return texts

    def _shrink(self) -> None:
        """Fewer slots, when the last answers fill few of them."""
        parts, wanted = self.engine.mesh.shape["data"], self.num_slots
        for _ in range(2):
            fewer = -(-(wanted // _SHRINK) // parts) * parts
            wanted = fewer if len(self.live) <= fewer else wanted
        if self.queue or wanted == self.num_slots:
            return
        kept = list(self.live)
        rows = np.asarray([*kept, *[kept[0]] * (wanted - len(kept))], np.int32)
        self.slots = shard_slots(self.engine.mesh, sampling.jit_select(self.slots, rows))
        self.live = dict(enumerate(self.live.values()))

    def _count(self, new: int) -> None:
        if self.progress:
            self.progress(new)


def _bucket(lengths: Iterable[int]) -> int:
    """Places for the longest of these."""
    return packing.bucket(max(lengths), _LEAST_PLACES)


def pieces_of(ids: TokenIds, size: int) -> list[np.ndarray]:
    """A text as pieces of `size` tokens, the first one filled up with zeros on the left."""
    padded = np.zeros(-(-len(ids) // size) * size, np.int32)
    padded[len(padded) - len(ids) :] = ids
    return list(padded.reshape(-1, size))


def _needs(answers: Sequence[Answer]) -> Needs:
    asked = [a.request.sampling for a in answers]
    return Needs(
        drawn=any(s.temperature > 0 for s in asked),
        top_k=any(s.top_k > 0 for s in asked),
        top_p=any(s.top_p < 1 for s in asked),
        min_p=any(s.min_p > 0 for s in asked),
        penalised=any(s.presence_penalty or s.repetition_penalty != 1 for s in asked),
    )


def _limits(answers: Sequence[Answer], size: int, num_stops: int) -> Limits:
    """Sampling parameters of the answers."""
    asked = [a.request.sampling for a in answers]
    floats = ("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty")
    stops = [[*a.stop_ids, *[-1] * (num_stops - len(a.stop_ids))] for a in answers]
    return Limits(
        **{n: _repeated([getattr(s, n) for s in asked], np.float32, size) for n in floats},
        top_k=_repeated([min(s.top_k, _NO_LIMIT) for s in asked], np.int32, size),
        max_new_tokens=_repeated([a.budget for a in answers], np.int32, size),
        stop_ids=_repeated(stops, np.int32, size),
        seed=_repeated([a.request.seed % 2**32 for a in answers], np.uint32, size),
    )


def _repeated(values: Sequence[Any], dtype: type, size: int) -> Array:
    """The values, and again from the first one, up to `size`: few shapes, few programs."""
    array: np.ndarray = np.asarray(values, dtype)
    return jnp.asarray(np.resize(array, (size, *array.shape[1:])))
