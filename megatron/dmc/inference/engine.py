"""The engine: requests go in, steps run, outputs come out. One thread drives it; a server wraps it.

``add_request`` checks and queues, ``step`` runs the model once over a mixed batch and returns what is new, ``abort``
ends a request. A request that is wrong, or whose logits are no numbers, ends alone; the others and the cache go on.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from megatron.dmc import kernels
from megatron.dmc.checkpoint.formats import hf
from megatron.dmc.inference import dummy
from megatron.dmc.inference import parallel as tp
from megatron.dmc.inference.cache import PagedCache, make_cache
from megatron.dmc.inference.config import EngineConfig, Sizes, resolve
from megatron.dmc.inference.graphs import DecodeGraphs
from megatron.dmc.inference.model import Batch, Model, Piece
from megatron.dmc.inference.prefix import PrefixCache
from megatron.dmc.inference.request import FinishReason, Sequence, StepOutput, Timing
from megatron.dmc.inference.sampler import Logprobs, Sampler, SamplerState, logprobs
from megatron.dmc.inference.sampling_params import SamplingParams
from megatron.dmc.inference.scheduler import Plan, Scheduler
from megatron.dmc.inference.text import Detokenizer
from megatron.dmc.inference.weights import dtype_of, read_info
from megatron.dmc.kernels.cpu_tuning import keep_freed_memory


@dataclass(frozen=True)
class EngineStats:
    """A moment's numbers, and totals since the start."""

    running: int
    waiting: int
    steps: int
    prompt_tokens: int
    """Read, those of pre-empted sequences again counted once more."""
    generation_tokens: int
    preemptions: int
    pages: int
    """Of the pool, over all ranks."""
    pages_used: int
    """By running sequences; what several share counts once."""
    pages_cached: int
    """By the prefix cache alone: they are given to sequences that need them."""
    slots_used: int
    """By running sequences; what several share counts once."""
    tokens_held: int
    """That the running sequences have read."""
    compression_ratio: float
    """Of the running sequences, tokens / slots; 1 when there are none."""
    waste: float
    """Share of the used pages' slots that is empty."""
    layer_compression_ratios: tuple[float, ...]
    """Of the running sequences, by layer."""
    prefix_cache_queries: int
    """Tokens of the prompts that were looked up in the prefix cache, each when it first got a row."""
    prefix_cache_hits: int
    """Those that were found."""


class Engine:
    """See the module. ``tokenizer`` may be None: requests are token ids then, and outputs have no text."""

    def __init__(
        self, path: str | Path | hf.HFDirectory, config: EngineConfig = EngineConfig(), tokenizer: Optional[Any] = None
    ) -> None:
        """Read the weights and reserve the cache. ``path`` may be a directory that is open already.

        Raises:
            ValueError: a setting or a model directory that is wrong, by name.
        """
        self.config, self.tokenizer = config, tokenizer
        device = config.torch_device()
        if device.type == "cpu":
            keep_freed_memory()
        if not isinstance(path, hf.HFDirectory):
            path = (dummy if config.load_format == "dummy" else hf).open_directory(path)
        directory, info = path, read_info(path)
        info.check_served()
        dtype = dtype_of(config.dtype, info, device)
        self.parallel = tp.initialize(config.tensor_parallel_size, device)
        self.model = Model(directory, info, self.parallel, dtype, device)
        self.sizes: Sizes = resolve(config, info, dtype, device)
        self.cache = self._make_cache(dtype, device)
        self.graphs = DecodeGraphs(self._run_batch, self.sizes.max_num_seqs, device) if self._takes_graphs() else None
        self.prefix = PrefixCache(
            self.cache, info.model.vocab_size, config.prefix_cache_min_tokens, config.enable_prefix_caching
        )
        sizes = self.sizes
        self.scheduler = Scheduler(
            self.cache, self.prefix, sizes.max_num_seqs, sizes.max_num_batched_tokens, info.expected_cr
        )
        self.sampler = Sampler(device, config.seed)
        self.device, self.info = device, info
        self.eos = self._eos_ids()
        self._requests: dict[str, list[Sequence]] = {}
        self._tickets = self._steps = self._prompt_tokens = self._generated = 0

    def _make_cache(self, dtype: torch.dtype, device: torch.device) -> PagedCache:
        info, model, sizes = self.model.info, self.model, self.sizes
        rows = sizes.max_num_seqs + sizes.max_prefix_snapshots
        return make_cache(
            parallel=self.parallel,
            num_pages=sizes.num_pages,
            max_seqs=rows,
            num_layers=info.model.num_layers,
            num_kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            max_slots=sizes.max_model_len,
            page_size=self.config.block_size,
            window=info.window,
            compress=info.compresses,
            dtype=dtype,
            device=device,
        )

    def _takes_graphs(self) -> bool:
        """Only CUDA kernels wait for nothing; the reference ones cannot be captured."""
        return (
            self.cache.state.k_pages.is_cuda
            and not self.config.enforce_eager
            and kernels.active_backend("cuda") == "cuda"
        )

    def _run_batch(self, batch: Batch) -> Tensor:
        return self.model.forward(batch, self.cache.state)

    def _eos_ids(self) -> frozenset[int]:
        own = getattr(self.tokenizer, "eos_token_id", None)
        return frozenset(self.info.eos) | (frozenset() if own is None else {own})

    # ------------------------------------------------------------------------------------------------------- requests

    def add_request(
        self,
        request_id: str,
        prompt: str | Seq[int],
        params: SamplingParams = SamplingParams(),
        *,
        cache_salt: Optional[str] = None,
    ) -> list[int]:
        """Queue a request; returns the prompt's token ids.

        Args:
            cache_salt: prefixes are shared among requests with the same one only.

        Raises:
            ValueError: what is wrong with it; nothing is queued then.
        """
        if request_id in self._requests:
            raise ValueError(f"request {request_id!r} is being answered already; give every request an id of its own")
        ids = self.tokenize(prompt)
        self.check(ids, params)
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos)
        longest = self.sizes.max_model_len
        limit = longest if params.max_tokens is None else min(longest, len(ids) + params.max_tokens)
        answers = [self._sequence(request_id, index, ids, params, stop_ids, limit) for index in range(params.n)]
        for sequence in answers:
            sequence.cache_salt, sequence.prompt_logprobs = cache_salt, answers[0].prompt_logprobs
        self._requests[request_id] = answers
        for sequence in answers:
            self.scheduler.add(sequence)
        return ids

    def _sequence(
        self, request_id: str, index: int, ids: list[int], params: SamplingParams, stop_ids: frozenset[int], limit: int
    ) -> Sequence:
        forbidden = stop_ids | self.eos if params.min_tokens else stop_ids
        state = SamplerState.start(params, ids, list(forbidden), self.info.model.vocab_size, index, self.device)
        text = None
        if self.tokenizer is not None:
            text = Detokenizer(
                self.tokenizer, ids, params.skip_special_tokens, params.stop, params.include_stop_str_in_output
            )
        self._tickets += 1
        return Sequence(request_id, index, self._tickets, list(ids), len(ids), params, state, stop_ids, limit, text)

    def tokenize(self, prompt: str | Seq[int]) -> list[int]:
        """Token ids of a text as the tokenizer makes them (with BOS where it adds one), or of ids as they are."""
        if not isinstance(prompt, str):
            return prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
        if self.tokenizer is None:
            raise ValueError(f"{self.info.path} has no tokenizer; give the prompt as token ids")
        return list(self.tokenizer(prompt)["input_ids"])

    def check(self, ids: Seq[int], params: SamplingParams) -> None:
        """Raise ``ValueError`` for a request that can never be answered."""
        size, longest = self.info.model.vocab_size, self.sizes.max_model_len
        if not ids:
            raise ValueError("the prompt is empty; give at least one token")
        for at, token in enumerate(ids):
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < size:
                raise ValueError(f"token {at} of the prompt is {token!r}; the model has the tokens 0 to {size - 1}")
        room = 0 if params.max_tokens == 0 else 1
        if len(ids) + room > longest:
            raise ValueError(
                f"the prompt has {len(ids)} tokens; {'with room for an answer ' * room}it may have {longest - room} "
                f"(max_model_len {longest})"
            )
        params.check_vocabulary(size)
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop is {list(params.stop)}, and there is no tokenizer; use stop_token_ids")
        pages = self.cache.pages_at((len(ids) + 1) / self.info.expected_cr)
        if pages > self.cache.num_pages:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and would take {pages} pages at the model's compression ratio of "
                f"{self.info.expected_cr:g}; the cache has {self.cache.num_pages}: give it more memory"
            )

    def abort(self, request_id: str) -> list[StepOutput]:
        """End a request now; the outputs say so. An unknown id is a request that has ended: nothing happens."""
        unfinished = list(self._requests.get(request_id, ()))
        return [self._finish(sequence, "abort") for sequence in unfinished]

    def has_unfinished(self) -> bool:
        return bool(self._requests)

    # ----------------------------------------------------------------------------------------------------------- steps

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Run one batch; what is new, in no particular order. Returns at once when there is nothing to do.

        Should it raise (a device out of memory), no request and no page is lost: the next step starts all of them
        again.
        """
        plan = self.scheduler.plan()
        outputs = [self._finish(sequence, "error", error=self._no_room(sequence)) for sequence in plan.stuck]
        if plan.counts or plan.ready:
            outputs += self._run(plan)
        return outputs

    def reset_prefix_cache(self) -> None:
        """Forget all snapshots: what comes next is read anew."""
        self.prefix.reset()

    def _no_room(self, sequence: Sequence) -> str:
        use = self.cache.use(sequence.row)
        return (
            f"the cache is full: {use.tokens} tokens take {use.total_slots} slots (CR {use.compression_ratio:.2f}), "
            f"and the pool has {self.cache.num_pages} pages of {self.cache.page_size}; give it more memory"
        )

    def _run(self, plan: Plan) -> list[StepOutput]:
        # Sequences with one token first: they decode.
        order = sorted(plan.counts.items(), key=lambda item: item[1] > 1)
        pieces = [self._piece(sequence, count, sequence in plan.snapshots) for sequence, count in order]
        logits = self._forward(pieces)
        last = [end - 1 for end in itertools.accumulate(piece.logits for piece in pieces)]
        drawing = [i for i, (sequence, count) in enumerate(order) if count == sequence.remaining]
        draws = [order[i][0] for i in drawing] + plan.ready
        drawn = self._draw(self._rows(logits, [last[i] for i in drawing], plan.ready), draws)
        if pieces:
            self.cache.stepped([piece.row for piece in pieces], [len(piece.tokens) for piece in pieces])
        self._count(order)
        self._read_prompt_logprobs(logits, order, pieces)
        spoiled = {sequence for sequence, (token, _) in zip(draws, drawn) if token is None}
        for (sequence, _), at in zip(order, last):
            if sequence in plan.snapshots and sequence not in spoiled:
                self.prefix.take(sequence, logits[at])
        return [self._advance(sequence, *draw) for sequence, draw in zip(draws, drawn)]

    def _rows(self, logits: Tensor, at: Seq[int], ready: Seq[Sequence]) -> Tensor:
        """Of the sequences that draw: [n, vocabulary]."""
        whole = len(at) == logits.size(0)  # as in every decode step
        rows = logits if whole else logits[torch.tensor(at, dtype=torch.long).to(self.device)]
        return torch.cat([rows, torch.stack([s.logits for s in ready])]) if ready else rows

    def _forward(self, pieces: Seq[Piece]) -> Tensor:
        try:
            if not pieces:
                return torch.empty(0, self.info.model.vocab_size, device=self.device)
            logits = self.graphs(pieces) if self.graphs is not None else None
            return self._run_batch(Batch.build(pieces, self.device)) if logits is None else logits
        except BaseException:
            # Layers may have taken the tokens or not: all is read again, should the caller go on.
            for sequence in list(self.scheduler.running):
                self.scheduler.preempt(sequence)
            raise

    def _piece(self, sequence: Sequence, count: int, snapshot: bool) -> Piece:
        start = sequence.computed
        assert sequence.row is not None
        wanted = sequence.wanted_logits(count) or int(snapshot)
        return Piece(sequence.row, start, sequence.tokens[start : start + count], wanted)

    def _count(self, order: Seq[tuple[Sequence, int]]) -> None:
        self._steps += 1
        for sequence, count in order:
            if sequence.computed < sequence.prompt_length:
                self._prompt_tokens += count
            sequence.computed += count

    def _draw(self, logits: Tensor, sequences: Seq[Sequence]) -> list[tuple[Optional[int], Optional[Logprobs]]]:
        """Next token of each (None: its logits are no numbers), and its log-probabilities when asked for."""
        if not sequences:
            return []
        low, high = logits.aminmax(dim=-1)  # a NaN is both
        sound = torch.isfinite(low) & torch.isfinite(high)
        # A row that is not sound is drawn from too, and thrown away: what to do is known on the host only.
        tokens = self.sampler(torch.where(sound[:, None], logits, 0.0), [s.sampler for s in sequences])
        tokens = self.parallel.from_first(torch.where(sound, tokens, -1))
        asked = [i for i, s in enumerate(sequences) if s.params.logprobs is not None]
        found: dict[int, Logprobs] = {}
        if asked:
            rows = torch.tensor(asked, device=logits.device)
            counts = [sequences[i].params.logprobs or 0 for i in asked]
            found = dict(zip(asked, logprobs(logits[rows], tokens[rows].clamp_min(0), counts)))
        return [(token if token >= 0 else None, found.get(i)) for i, token in enumerate(tokens.tolist())]

    def _read_prompt_logprobs(self, logits: Tensor, order: Seq[tuple[Sequence, int]], pieces: Seq[Piece]) -> None:
        """Position t of a prompt predicts its token t + 1."""
        if all(sequence.params.prompt_logprobs is None for sequence, _ in order):
            return
        at = 0
        for (sequence, _), piece in zip(order, pieces):
            rows, at = logits[at : at + piece.logits], at + piece.logits
            asked = sequence.params.prompt_logprobs
            have = len(sequence.prompt_logprobs)
            if asked is None or have >= sequence.prompt_length - 1:
                continue
            # Some of them were read before a pre-emption.
            targets = sequence.tokens[have + 1 : min(piece.start + len(piece.tokens), sequence.prompt_length - 1) + 1]
            if targets:
                rows = rows[have - piece.start :][: len(targets)]
                sequence.prompt_logprobs += logprobs(
                    rows, torch.tensor(targets, device=rows.device), [asked] * len(targets)
                )

    def _advance(self, sequence: Sequence, token: Optional[int], found: Optional[Logprobs]) -> StepOutput:
        """One more token of an answer, and whether it is the last."""
        if token is None:
            return self._finish(
                sequence, "error", error=f"the model's logits after {len(sequence.tokens)} tokens are not finite"
            )
        if sequence.limit == sequence.prompt_length:  # max_tokens 0: the prompt was all
            return self._finish(sequence, "length", prompt_logprobs=tuple(sequence.prompt_logprobs))
        first, sequence.logits = sequence.generated == 0, None
        sequence.tokens.append(token)
        sequence.sampler.record(token)
        self._generated += 1
        if first:
            sequence.first_token = time.monotonic()
        news: dict[str, Any] = {"tokens": (token,), "logprobs": (found,) if found else ()}
        if first:
            news["prompt_logprobs"] = tuple(sequence.prompt_logprobs)
        reason, cause = self._ends(sequence, token)
        if reason is not None:
            return self._finish(sequence, reason, stop_reason=cause, **news)
        return StepOutput(
            sequence.request_id,
            sequence.index,
            text=sequence.text.take() if sequence.text else "",
            num_cached_tokens=sequence.num_cached_tokens or 0,
            **news,
        )

    def _ends(self, sequence: Sequence, token: int) -> tuple[Optional[FinishReason], int | str | None]:
        """(reason, stop token or string). Takes the token into the text, unless it stops the answer."""
        params, enough = sequence.params, sequence.generated >= sequence.params.min_tokens
        if enough and token in sequence.stop_ids:
            return "stop", None if token in self.eos and token not in params.stop_token_ids else token
        if sequence.text is not None:
            sequence.text.push(token, check_stop=enough)
            if sequence.text.stopped is not None:
                return "stop", sequence.text.stopped
        return ("length", None) if len(sequence.tokens) >= sequence.limit else (None, None)

    def _finish(self, sequence: Sequence, reason: FinishReason, **news: Any) -> StepOutput:
        """Give back what the sequence holds; its last output."""
        use = self.cache.use(sequence.row) if sequence.row is not None else None
        self.scheduler.remove(sequence, sound=reason != "error")
        answers = self._requests[sequence.request_id]
        answers.remove(sequence)
        if not answers:
            del self._requests[sequence.request_id]
        text = ""
        if sequence.text is not None:
            sequence.text.flush()
            text = sequence.text.take()
        return StepOutput(
            sequence.request_id,
            sequence.index,
            text=text,
            finish_reason=reason,
            cache=use,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            timing=_timing(sequence),
            **news,
        )

    def stats(self) -> EngineStats:
        """Waits for nothing: from the host's copy after the last step."""
        cache, live = self.cache, self.cache.live
        pages, slots = cache.num_pages * self.parallel.size, cache.live_slots()
        used = pages - int(cache.available_pages().sum())
        cached = pages - used - int(cache.free_pages().sum())
        held, whole = int(cache.tokens[live].sum()), int(cache.lengths[live].sum())
        # [rows, ranks, L H] -> [L]
        layers = cache.lengths[live].sum((0, 1)).reshape(cache.shape).sum(1).tolist()
        states = held * cache.lengths[0].size // len(layers)
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generated,
            preemptions=self.scheduler.preemptions,
            pages=pages,
            pages_used=used,
            pages_cached=cached,
            slots_used=slots,
            tokens_held=held,
            compression_ratio=held * cache.lengths[0].size / whole if whole else 1.0,
            waste=1 - slots / (used * cache.page_size) if used else 0.0,
            layer_compression_ratios=tuple(states / n if n else 1.0 for n in layers),
            prefix_cache_queries=self.prefix.queries,
            prefix_cache_hits=self.prefix.hits,
        )


def _timing(sequence: Sequence) -> Timing:
    def since(moment: Optional[float]) -> Optional[float]:
        return None if moment is None else moment - sequence.arrived

    return Timing(
        since(sequence.started), since(sequence.first_token), time.monotonic() - sequence.arrived, sequence.preemptions
    )
