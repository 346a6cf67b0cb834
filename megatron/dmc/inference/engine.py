"""The engine: requests go in, steps run, outputs come out. One thread drives it; a server wraps it.

``add_request`` checks and queues, ``step`` runs the model once over a mixed batch and returns what is new, ``abort``
ends a request. A request that is wrong, or whose logits hold NaN or Inf, ends alone; the others and the cache go on.

With asynchronous scheduling the next step is launched before the results of the last one are waited for, so that the
device does not wait for the host. Of a sequence that turns out to have ended, the next token is thrown away.
"""

from collections import deque
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

from megatron.dmc import kernels
from megatron.dmc.checkpoint.formats import adapter, hf
from megatron.dmc.config.checks import shown
from megatron.dmc.inference import parallel as tp
from megatron.dmc.inference.cache import PagedCache
from megatron.dmc.inference.config import EngineConfig, Sizes, resolve
from megatron.dmc.inference.device_queue import DeviceQueue
from megatron.dmc.inference.errors import InvalidRequest
from megatron.dmc.inference.grammar import GrammarCompiler
from megatron.dmc.inference.input_processor import InputProcessor
from megatron.dmc.inference.kv_cache_manager import KVCacheManager
from megatron.dmc.inference.model import Model
from megatron.dmc.inference.model_runner import ModelRunner, StepInFlight
from megatron.dmc.inference.output_processor import OutputProcessor
from megatron.dmc.inference.request import Request, Sequence, StepOutput
from megatron.dmc.inference.sampler import Sampler, SamplerState
from megatron.dmc.inference.sampling_params import SamplingParams
from megatron.dmc.inference.scheduler import Scheduler, SchedulerOutput
from megatron.dmc.inference.text import Detokenizer
from megatron.dmc.inference.weights import dtype_of, read_info
from megatron.dmc.kernels.cpu_tuning import keep_freed_memory


@dataclass(frozen=True)
class EngineStats:
    """The engine's state at one moment, and totals since its start."""

    running: int
    """Sequences in the cache."""
    waiting: int
    """Sequences that wait for a row of the cache."""
    steps: int
    """Steps that ran the model or sampled."""
    prompt_tokens: int
    """Prompt tokens processed, including those recomputed after preemption."""
    generation_tokens: int
    """Tokens sampled."""
    preemptions: int
    """Preemptions of running sequences."""
    pages: int
    """Number of pages in the pool, over all ranks."""
    pages_used: int
    """Pages held by running sequences; a page that several of them share counts once."""
    pages_cached: int
    """Pages held by the prefix cache alone, which sequences that need them will get."""
    slots_used: int
    """KV slots held by running sequences; slots that several of them share count once."""
    tokens_held: int
    """Tokens of the running sequences whose keys and values are in the cache."""
    compression_ratio: float
    """Tokens per slot of the running sequences; 1 when there are none."""
    waste: float
    """Empty share of the slots in used pages."""
    layer_compression_ratios: tuple[float, ...]
    """Tokens per slot of the running sequences, by layer."""
    prefix_cache_queries: int
    """Prompt tokens looked up in the prefix cache, when their sequences were first scheduled."""
    prefix_cache_hits: int
    """Prompt tokens found in the prefix cache."""


class Engine:
    """Continuous batching over one model and one paged compressed cache."""

    def __init__(
        self, path: str | Path | hf.HFDirectory, config: EngineConfig = EngineConfig(), tokenizer: Optional[Any] = None
    ) -> None:
        """Load the weights and reserve the cache.

        Args:
            path: model directory, or one that is open already.
            tokenizer: None takes prompts as token ids only, and outputs have no text.

        Raises:
            ValueError: a setting or a model directory that is wrong, by name.
        """
        self.config, self.tokenizer = config, tokenizer
        self.device = device = config.torch_device()
        if device.type == "cpu":
            keep_freed_memory()
        if not isinstance(path, hf.HFDirectory):
            path = config.open_directory(path)
        self.info = info = read_info(path)
        info.check_served()
        quantization = config.weight_quantization()
        quantized = config.dtype == "auto" and (quantization or info.quantization)
        dtype = dtype_of("bfloat16" if quantized else config.dtype, info, device)
        self.parallel = tp.initialize(config.tensor_parallel_size, device)
        checked = config.load_format != "dummy" and self.parallel.rank == 0
        with adapter.checking(path) if checked else nullcontext():
            self.model = Model(path, info, self.parallel, dtype, device, quantization)
        self.sizes: Sizes = resolve(config, info, dtype, device)
        self.async_scheduling = device.type == "cuda" if config.async_scheduling is None else config.async_scheduling
        self.queue = DeviceQueue(threaded=self.async_scheduling and device.type == "cpu")
        self.cache = self._make_cache(dtype)
        sizes, vocab_size = self.sizes, info.model.vocab_size
        sampler = Sampler(device, config.seed)
        self.runner = ModelRunner(
            self.model, self.cache, sampler, sizes.max_num_seqs, self._takes_graphs(), self.async_scheduling
        )
        self.kv_cache_manager = KVCacheManager(
            self.cache, vocab_size, config.prefix_cache_min_tokens, config.enable_prefix_caching
        )
        self.scheduler = Scheduler(
            self.cache, self.kv_cache_manager, sizes.max_num_seqs, sizes.max_num_batched_tokens, info.expected_cr
        )
        eos = self._eos_token_ids()
        grammars = GrammarCompiler(tokenizer, vocab_size, eos)
        self.input_processor = InputProcessor(
            tokenizer,
            vocab_size,
            sizes.max_model_len,
            self.cache,
            info.expected_cr,
            info.path,
            grammars,
            config.max_logprobs,
        )
        self.output_processor = OutputProcessor(self.scheduler, self.cache, eos)
        self._in_flight: deque[tuple[SchedulerOutput, StepInFlight]] = deque()
        """Steps that were launched, oldest first: at most one between two calls of :meth:`step`."""
        self._arrivals = self._steps = self._prompt_tokens = 0

    def _make_cache(self, dtype: torch.dtype) -> PagedCache:
        info, model, sizes = self.info, self.model, self.sizes
        state = kernels.make_state(
            num_pages=sizes.num_pages,
            max_seqs=sizes.max_num_seqs + sizes.max_prefix_snapshots,
            num_layers=info.model.num_layers,
            num_kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            max_slots=sizes.max_model_len,
            page_size=self.config.block_size,
            **model.attention.method.state_options(),
            dtype=dtype,
            kv_dtype=self.config.kv_dtype(),
            device=self.device,
        )
        return PagedCache(state, self.parallel, self.queue, self.async_scheduling)

    @property
    def quantization(self) -> Optional[str]:
        """How the weights are quantized: at load (int8, int4), or in their files, by the format's name; None: not."""
        return self.config.quantization or self.info.quantization

    def _takes_graphs(self) -> bool:
        """Whether decode steps are captured as CUDA graphs:
        the reference kernels wait for the device, so they cannot be.
        """
        on_gpu = self.cache.state.k_pages.is_cuda
        return on_gpu and not self.config.enforce_eager and kernels.active_backend("cuda") == "cuda"

    def _eos_token_ids(self) -> frozenset[int]:
        own = getattr(self.tokenizer, "eos_token_id", None)
        return frozenset(self.info.eos) | (frozenset() if own is None else {own})

    # ------------------------------------------------------------------------------------------------------- requests

    def add_request(
        self,
        request_id: str,
        prompt: str | Iterable[int],
        sampling_params: SamplingParams = SamplingParams(),
        *,
        cache_salt: Optional[str] = None,
    ) -> Request:
        """Check and queue a request.

        Args:
            prompt: text, or token ids.
            cache_salt: requests share cached prefixes with requests of the same salt only.

        Raises:
            InvalidRequest: what is wrong with it; nothing is queued then.
        """
        request = self.input_processor.process(request_id, prompt, sampling_params, cache_salt=cache_salt)
        self.add(request)
        return request

    def add(self, request: Request) -> None:
        """Queue a request that was checked (see :class:`InputProcessor`). Raises :class:`InvalidRequest` for its id."""
        if request.request_id in self.output_processor.unfinished:
            raise InvalidRequest(
                f"request {shown(request.request_id)} is still running; give every request an id of its own",
                "request_id",
            )
        sequences = self._make_sequences(request)
        self.output_processor.add(request.request_id, sequences)
        for sequence in sequences:
            self.scheduler.add(sequence)

    def _make_sequences(self, request: Request) -> list[Sequence]:
        params, prompt, longest = request.sampling_params, request.prompt_token_ids, self.sizes.max_model_len
        eos = self.output_processor.eos_token_ids
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos)
        forbidden = list(stop_ids | eos if params.min_tokens else stop_ids)
        max_length = longest if params.max_tokens is None else min(longest, len(prompt) + params.max_tokens)
        prompt_logprobs: list[Any] = []
        # Rank 0 samples for all ranks, so it alone follows the grammar.
        grammar = (request.grammar or self.input_processor.grammar(params)) if self.parallel.rank == 0 else None
        sequences = []
        for index in range(params.n):
            state = SamplerState.start(
                params, prompt, forbidden, self.info.model.vocab_size, index, self.device, request.bad_word_ids
            )
            text = None if self.tokenizer is None else Detokenizer(self.tokenizer, prompt, params)
            self._arrivals += 1
            sequences.append(
                Sequence(
                    request,
                    index,
                    self._arrivals,
                    list(prompt),
                    state,
                    stop_ids,
                    max_length,
                    text,
                    None if grammar is None else grammar.start(),
                    prompt_logprobs,
                )
            )
        return sequences

    def tokenize(self, prompt: str | Iterable[int]) -> list[int]:
        """Token ids of a text as a request would have them, or token ids as they are."""
        return self.input_processor.tokenize(prompt)

    def abort(self, request_id: str) -> list[StepOutput]:
        """End a request now; returns its last outputs. An unknown id is a request that has ended: nothing happens."""
        unfinished = list(self.output_processor.unfinished.get(request_id, ()))
        outputs = [self.output_processor.finish(sequence, "abort") for sequence in unfinished]
        if outputs and not self.output_processor.unfinished:
            while self._in_flight:  # nobody else would wait for it, and it holds pages
                self._finish_step()
        return outputs

    def abort_all(self) -> None:
        """End all requests now."""
        for request_id in self.unfinished_requests():
            self.abort(request_id)

    def unfinished_requests(self) -> list[str]:
        """Ids of the requests that wait or run."""
        return list(self.output_processor.unfinished)

    def has_unfinished(self) -> bool:
        """Whether :meth:`step` has something to do: a request waits or runs, or a step is in flight."""
        return bool(self.output_processor.unfinished or self._in_flight)

    # ----------------------------------------------------------------------------------------------------------- steps

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Run one batch; returns what is new, in no particular order. Returns at once when there is nothing to do.

        A sequence's first output may be empty: it says that the sequence was scheduled. Should a step raise (a device
        out of memory), no request and no page is lost: the next step computes all of them again.
        """
        outputs = [] if self._in_flight else self._launch(self.scheduler.schedule())
        if self.async_scheduling and self._in_flight:
            in_flight, _ = self._in_flight[-1]
            outputs += self._launch(self.scheduler.schedule_ahead(in_flight.scheduled))
        return outputs + self._finish_step() if self._in_flight else outputs

    def _launch(self, output: SchedulerOutput) -> list[StepOutput]:
        """Launch a step, if there is anything to compute; returns what is known without."""
        outputs = [
            self.output_processor.finish(sequence, "error", error=self._no_room(sequence))
            for sequence in output.unschedulable
        ]
        if not output.scheduled:
            return outputs + self.output_processor.scheduled(output.admitted, outputs)
        try:
            self._in_flight.append((output, self.runner.launch(output.scheduled)))
        except BaseException:
            self._reset()
            raise
        self.scheduler.launched(output.scheduled)
        return outputs

    def _finish_step(self) -> list[StepOutput]:
        """Wait for the results of the oldest step in flight, and return what is new in them."""
        output, step = self._in_flight[0]
        try:
            result = step.result()
            self.scheduler.landed(output.scheduled, result.lengths)
        except BaseException:
            self._reset()
            raise
        self._in_flight.popleft()
        self._steps += 1
        self._prompt_tokens += sum(p.num_tokens for p in output.scheduled if p.start < p.sequence.prompt_length)
        for sequence, logits in result.snapshots:
            if not sequence.ended:
                self.kv_cache_manager.take_snapshot(sequence, logits)
        outputs = self.output_processor.process(item for item in result.sampled if not item.sequence.ended)
        return outputs + self.output_processor.scheduled(output.admitted, outputs)

    def _reset(self) -> None:
        """Give up the steps in flight: layers may have taken their tokens or not, so all is computed again."""
        self._in_flight.clear()
        self.queue.reset()
        self.scheduler.reset()

    def _no_room(self, sequence: Sequence) -> str:
        usage = self.cache.usage(sequence.row)
        return (
            f"the cache is full: {usage.tokens} tokens take {usage.total_slots} slots (CR "
            f"{usage.compression_ratio:.2f}), and the pool has {self.cache.num_pages} pages of {self.cache.page_size}; "
            "give it more memory"
        )

    # ------------------------------------------------------------------------------------------------------- operation

    def reset_prefix_cache(self) -> None:
        """Evict all cached prefixes."""
        self.kv_cache_manager.reset()

    def broadcast(self, value: int) -> int:
        """The value that rank 0 gives, on every tensor-parallel rank."""
        if self.parallel.size == 1:
            return value
        given = torch.tensor(value, device=self.device)
        return int(self.queue.submit(lambda: self.parallel.from_first(given)).result())

    def barrier(self) -> None:
        """Wait until every tensor-parallel rank has come here."""
        if self.parallel.size > 1:
            self.queue.submit(lambda: torch.distributed.barrier(self.parallel.group)).result()

    def stats(self) -> EngineStats:
        """State and totals after the last step that has ended; pages in use as there are at most after one in flight.
        Does not wait for the device.
        """
        cache, live = self.cache, self.cache.live
        pages, slots = cache.num_pages * self.parallel.size, cache.live_slots()
        used = pages - int(cache.available_pages().sum())
        cached = pages - used - int(cache.free_pages().sum())
        held, by_head = int(cache.tokens[live].sum()), cache.slots(live)
        # [rows, ranks, L H] -> [L]
        layers = by_head.sum((0, 1)).reshape(cache.shape).sum(1).tolist()
        whole = sum(layers)
        states = held * cache.lengths[0].size // len(layers)
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self.output_processor.num_generated_tokens,
            preemptions=self.scheduler.num_preemptions,
            pages=pages,
            pages_used=used,
            pages_cached=cached,
            slots_used=slots,
            tokens_held=held,
            compression_ratio=held * cache.lengths[0].size / whole if whole else 1.0,
            waste=1 - slots / (used * cache.page_size) if used else 0.0,
            layer_compression_ratios=tuple(states / n if n else 1.0 for n in layers),
            prefix_cache_queries=self.kv_cache_manager.num_queried_tokens,
            prefix_cache_hits=self.kv_cache_manager.num_hit_tokens,
        )
