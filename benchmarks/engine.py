"""Decoding with the inference engine: compressed caches against CR 1 at the same cache memory, and the plain model
against transformers.

A random Llama whose heads mark three tokens of four (at CR 4), each head others: the decision neuron reads channels of
the embedding that nothing else writes. Marked tokens are merged, or with ``--method dms`` evicted ``--window`` tokens
later. Ratios are of interleaved rounds in one run.

1. Cache memory for ``--cache-tokens`` tokens at CR 1, page tables and rings included. All engines take in as many
   sequences of ``--contexts`` tokens as fit, then decode: tokens per second of all sequences together, sequences, share
   of empty slots in the pages. The contexts are not computed: while sequences are read, a stand-in for the model gives
   random keys and values, and decisions, to the method's append. Scheduler, cache and pages do what they always do; the
   decoding steps are the model's own. ``--kv-cache-dtype int8`` adds every compressed model with a cache of 8 bits; CR
   1 keeps the model's type.
2. The plain model in the engine and in transformers' ``generate`` with its dynamic cache and sdpa attention, both with
   all threads: same prompts, greedy, batch 1 and 16, reading of the prompts included.

Targets (--check): 1. of DMC at CR 4 at least 3.6 times the sequences up to 4,096 tokens, and 3 times the tokens per
second from 8,192 on, 7 times with an int8 cache; of DMS from 16,384 on 3.7 times the tokens per second at CR 4 and 6
times at CR 8. 2. at least 1.5 times the tokens per second at both batch sizes, and the same tokens.
"""

import argparse
import gc
import json
import math
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from _common import add_device, arguments, finish, interleave, ratio, resolve_device, run_script, spread, table

from megatron.dmc.checkpoint import mapping
from megatron.dmc.config import DMCConfig
from megatron.dmc.inference import LLM, SamplingParams
from megatron.dmc.inference.attention import CompressedAttention, Step
from megatron.dmc.inference.cache import page_bytes, row_bytes
from megatron.dmc.inference.methods import StepTokens
from megatron.dmc.inference.weights import ModelInfo
from megatron.dmc.kernels import active_backend
from megatron.dmc.kernels.state import CacheState

TRANSFORMERS_TARGET = 1.5
SEQUENCES_TARGETS = {("dmc", 4, "auto"): (4096, 3.6)}
"""Method, compression ratio and type of the cache -> (longest context, times the sequences of CR 1)."""
DECODE_TARGETS = {
    ("dmc", 4, "auto"): (8192, 3.0),
    ("dmc", 4, "int8"): (8192, 7.0),
    ("dms", 4, "auto"): (16384, 3.7),
    ("dms", 8, "auto"): (16384, 6.0),
}
"""Method, compression ratio and type of the cache -> (shortest context, times the tokens per second of CR 1)."""
SIGNALS = 64  # channels of the embedding that decide
STEPS, ROUNDS = 4, 7  # decoding steps per measurement, measurements
PAGE, FILL = 16, 8192  # slots of a page; tokens of a step while contexts are filled in


class Variant(NamedTuple):
    """A model as an engine has it."""

    cr: float
    kv_cache_dtype: str = "auto"

    @property
    def name(self) -> str:
        return f"CR {self.cr:g}" + ("" if self.kv_cache_dtype == "auto" else f", {self.kv_cache_dtype} cache")


PLAIN = Variant(1.0)


def write_model(directory: Path, args: argparse.Namespace, dtype: torch.dtype, cr: float) -> Path:
    """A directory of random weights, compressed or (at CR 1) plain."""
    from safetensors.torch import save_file

    h, heads, d, ffn, vocabulary = args.hidden, args.heads, args.head_dim, 2 * args.hidden, 1024
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    embedding = torch.randn(vocabulary, h, generator=generator)
    # At CR 4 a token says "keep" in a quarter of these channels.
    embedding[:, :SIGNALS] = torch.where(torch.rand(vocabulary, SIGNALS, generator=generator) < 1 / cr, -1.0, 1.0)
    weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.ones(h),
        "lm_head.weight": draw(vocabulary, h),
    }
    for n in range(args.layers):
        name = f"model.layers.{n}."
        for projection in "qkv":
            weights[f"{name}self_attn.{projection}_proj.weight"] = draw(heads * d, h)
        neurons = weights[f"{name}self_attn.k_proj.weight"].view(heads, d, h)[:, -1]
        neurons.zero_()
        neurons[torch.arange(heads), (torch.arange(heads) + n * heads) % SIGNALS] = 1.0
        shapes = {
            "self_attn.o_proj": (h, heads * d),
            "mlp.gate_proj": (ffn, h),
            "mlp.up_proj": (ffn, h),
            "mlp.down_proj": (h, ffn),
        }
        for part, (rows, columns) in shapes.items():
            weights[f"{name}{part}.weight"] = draw(rows, columns)
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"{name}{part}.weight"][:SIGNALS] = 0
        weights |= {f"{name}{norm}.weight": torch.ones(h) for norm in ("input_layernorm", "post_attention_layernorm")}
    plain = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_size=h,
        intermediate_size=ffn,
        rope_theta=1e4,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=d,
        rms_norm_eps=1e-5,
        vocab_size=vocabulary,
        max_position_embeddings=max(args.contexts) + 4096,
        tie_word_embeddings=False,
        hidden_act="silu",
        torch_dtype=str(dtype).removeprefix("torch."),
    )
    dmc = DMCConfig(args.method, decision_bias=0.0, window=args.window if args.method == "dms" else 12)
    block = mapping.DMCBlock("llama", dmc, "finetune", step=1, target_cr=cr, measured_cr=cr)
    path = directory / f"CR {cr:g}"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(plain if cr == 1 else mapping.with_block(plain, block)))
    file = path / "model.safetensors"
    save_file({key: value.to(dtype).contiguous() for key, value in weights.items()}, file, {"format": "pt"})
    return path


def prompts(count: int, length: int, seed: int = 1) -> list[list[int]]:
    return torch.randint(1, 1024, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


class StandIn:
    """Takes the place of a model: appends random tokens to its cache, as many of them marked as it says of itself."""

    def __init__(
        self,
        attention: CompressedAttention,
        info: ModelInfo,
        heads: int,
        tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """heads: KV heads of the rank. tokens: most of a step."""
        self.attention, self.info = attention, info
        generator = torch.Generator().manual_seed(2)
        shape = (tokens, heads, info.model.head_dim)
        self.q, self.k, self.v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))

    def append(self, state: CacheState, step: Step, count: int) -> None:
        """Append ``count`` tokens of a step to all layers."""
        for layer in range(self.info.model.num_layers):
            # Above the bias: marked.
            kept = torch.rand(count, self.k.size(1), device=self.k.device) < 1 / self.info.expected_cr
            self.k[:count, :, -1] = 1 - 2 * kept.to(self.k.dtype)
            where = (step.cu_seqlens, step.rows, step.positions)
            raw = (self.q[:count], self.k[:count], self.v[:count])
            tokens = StepTokens(*raw, *where, self.attention.inv_freq, decisions=None, partial=False)
            self.attention.method.append(state, layer, tokens)


def room(context: int, rows: int, step: int = FILL) -> int:
    """Tokens that a sequence decodes at most: in the measurements and two to warm up, and while all others are read in
    steps of ``step`` tokens.
    """
    return (ROUNDS + 2) * STEPS + math.ceil(1.1 * rows * context / step) + PAGE


def fill(llm: LLM, prompts: list[list[int]], new: int) -> None:
    """Let an engine read as many of the prompts as its cache takes, until all decode; each may decode ``new`` tokens.
    The rest of the requests is gone.
    """
    engine = llm.engine
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True))
    while True:
        before = list(engine.scheduler.running)
        all_decode = bool(before) and all(sequence.num_uncomputed_tokens == 1 for sequence in before)
        engine.step()
        if all_decode and engine.scheduler.running == before:
            break  # there was nothing to read, and still no room for another
    for sequence in list(engine.scheduler.waiting):
        engine.abort(sequence.request.request_id)
    # Whoever decodes on needs pages: one more of each kind for every head, or else the youngest would be preempted
    # while we measure.
    kinds = 2 if engine.cache.window.size else 1
    while int(engine.cache.free_pages().min()) < len(engine.scheduler.running) * kinds * engine.cache.heads:
        engine.abort(engine.scheduler.running[-1].request.request_id)
        while engine.scheduler.ending:  # a step in flight holds its pages
            engine.step()


def filled(
    path: Path,
    context: int,
    rows: int,
    new: int,
    memory: int,
    device: torch.device,
    kv_cache_dtype: str = "auto",
    step: int = FILL,
) -> LLM:
    """An engine with as many decoding sequences of stand-in contexts as its cache takes, read in steps of ``step``
    tokens; see :func:`fill`.
    """
    llm = LLM(
        path,
        device=device.type,
        kv_cache_memory_bytes=memory,
        kv_cache_dtype=kv_cache_dtype,
        max_num_seqs=rows,
        max_model_len=context + new,
        max_num_batched_tokens=step,
        enable_prefix_caching=False,
    )
    engine, model = llm.engine, llm.engine.model
    tokens = engine.sizes.max_num_batched_tokens
    stand_in = StandIn(model.attention, model.info, model.kv_heads, tokens, model.device, model.dtype)

    def forward(batch, state) -> torch.Tensor:
        stand_in.append(state, batch, batch.tokens.numel())
        return torch.zeros(batch.logits_at.numel(), model.info.model.vocab_size, device=model.device)

    model.forward = forward
    fill(llm, prompts(rows, context), new)
    del model.forward
    return llm


def budget(longest: int, sequences: int, heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of the cache for so many sequences of a plain model, of ``longest`` tokens each, on ``heads`` KV
    heads in all layers.
    """
    pages = sequences * heads * -(-longest // PAGE)
    rows = sequences * row_bytes(heads, longest, PAGE)
    return pages * (page_bytes(PAGE, head_dim, dtype) + 8) + rows


def decode_in_turn(engines: dict, device: torch.device, seconds: float) -> tuple[dict, dict[object, list[float]]]:
    """Let filled engines decode in turn: figures of each, and milliseconds per token in each round, by their names."""
    before = {name: engine.stats() for name, engine in engines.items()}

    def run(engine):
        return lambda: [engine.step() for _ in range(STEPS)]

    # So few rounds that what is decoded stays within the room of each sequence.
    runs = {name: run(engine) for name, engine in engines.items()}
    times = interleave(runs, device, seconds=seconds, rounds=(ROUNDS, ROUNDS))
    for name, engine in engines.items():  # else the times are of something else
        was, now = before[name], engine.stats()
        assert (now.running, now.preemptions) == (was.running, was.preemptions), f"{name}: {was} became {now}"
    per_token = {name: [t / before[name].running for t in series] for name, series in times.items()}
    figures = {
        name: {
            "sequences": s.running,
            "compression_ratio": s.compression_ratio,
            "waste": s.waste,
            "pages": s.pages,
            "tokens_per_second": spread([1e3 * STEPS / t for t in per_token[name]]),
            "step_ms": spread([t / STEPS for t in times[name]]),
        }
        for name, s in before.items()
    }
    return figures, per_token


def decode(
    models: dict[Variant, Path], context: int, args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> dict:
    """Engines of all variants, filled and decoding in turn."""
    count, rows = max(1, args.cache_tokens // context), {}
    for variant in models:
        smaller = 1 if variant.kv_cache_dtype == "auto" else dtype.itemsize
        rows[variant] = math.ceil(variant.cr * count * smaller) + (variant != PLAIN)
    new = room(context, max(rows.values()))
    memory = budget(context + new, count, args.layers * args.heads, args.head_dim, dtype)
    engines = {
        variant: filled(path, context, rows[variant], new, memory, device, variant.kv_cache_dtype).engine
        for variant, path in models.items()
    }
    found, per_token = decode_in_turn(engines, device, args.seconds)
    for variant, x in found.items():
        x["sequences_ratio"] = x["sequences"] / found[PLAIN]["sequences"]
        x["tokens_ratio"] = ratio(per_token[PLAIN], per_token[variant])
    return {"cache_bytes": memory, **{variant.name: x for variant, x in found.items()}}


def fixed_memory(
    models: dict[Variant, Path], args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[dict, list[str]]:
    figures, missed, rows = {}, [], []
    for context in args.contexts:
        f = figures[f"context {context}"] = decode(models, context, args, device, dtype)
        gc.collect()
        for variant in models:
            x = f[variant.name]
            more, faster = x["sequences_ratio"], x["tokens_ratio"]
            row = [context, variant.name, x["sequences"], x["compression_ratio"], f"{x['waste']:.1%}"]
            row += [x["step_ms"]["median"], x["tokens_per_second"]["median"]]
            compared = [more, faster["median"], f"{faster['q1']:.2f}-{faster['q3']:.2f}"]
            rows.append([*row, *(["", "", ""] if variant == PLAIN else compared)])
            longest, wanted = SEQUENCES_TARGETS.get((args.method, *variant), (0, 0))
            if context <= longest and more < wanted:
                missed.append(f"{variant.name}: {more:.2f} times the sequences of {context} tokens, not {wanted}")
            shortest, wanted = DECODE_TARGETS.get((args.method, *variant), (math.inf, 0))
            if context >= shortest and faster["median"] < wanted:
                what = f"times the tokens per second at {context} tokens"
                missed.append(f"{variant.name}: {faster['median']:.2f} {what}, not {wanted}")
    columns = (
        "context",
        "",
        "sequences",
        "CR",
        "empty",
        "ms/step",
        "tokens/s",
        "x sequences",
        "x tokens/s",
        "quartiles",
    )
    print(table(columns, rows), end="\n\n")
    return figures, missed


def against_transformers(
    plain: Path, args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[dict, list[str]]:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        plain, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
    )
    reference = reference.to(device).eval()
    # Without prefix caching: every round asks the same prompts.
    llm = LLM(
        plain,
        device=device.type,
        max_num_seqs=16,
        enable_prefix_caching=False,
        num_pages=16 * args.layers * args.heads * (-(-(args.prompt + args.new_tokens) // 16) + 1),
    )
    params = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True)
    figures, missed, rows = {}, [], []
    for batch in (1, 16):
        ids = prompts(batch, args.prompt, seed=batch)
        tensor, found = torch.tensor(ids, device=device), {}

        def engine(ids=ids, found=found):
            found["engine"] = [r.outputs[0].token_ids for r in llm.generate(ids, params)]

        def transformers(tensor=tensor, found=found):
            out = reference.generate(
                tensor,
                max_new_tokens=args.new_tokens,
                min_new_tokens=args.new_tokens,
                do_sample=False,
                attention_mask=torch.ones_like(tensor),
                pad_token_id=0,
            )
            found["transformers"] = out[:, args.prompt :].tolist()

        times = interleave(
            {"engine": engine, "transformers": transformers}, device, seconds=args.seconds, rounds=(3, 9)
        )
        faster = ratio(times["transformers"], times["engine"])
        same = sum(a == b for one, two in zip(found["engine"], found["transformers"]) for a, b in zip(one, two))
        same /= batch * args.new_tokens
        speed = {name: spread([1e3 * batch * args.new_tokens / t for t in series]) for name, series in times.items()}
        figures[f"batch {batch}"] = {"tokens_per_second": speed, "ratio": faster, "same_tokens": same}
        rows.append(
            (batch, speed["engine"]["median"], speed["transformers"]["median"], faster["median"], f"{same:.1%}")
        )
        if faster["median"] < TRANSFORMERS_TARGET:
            missed.append(
                f"batch {batch}: {faster['median']:.2f} times transformers' tokens per second, not "
                f"{TRANSFORMERS_TARGET}"
            )
        if dtype == torch.float32 and same < 1:
            missed.append(f"batch {batch}: {same:.1%} of the tokens are transformers'")
    print(table(("batch", "engine tokens/s", "transformers", "ratio", "same tokens"), rows))
    return figures, missed


def main() -> None:
    parser = arguments(__doc__)
    add_device(parser)
    for name, value, text in (
        ("layers", 4, ""),
        ("hidden", 512, ""),
        ("heads", 32, "query and KV heads"),
        ("head-dim", 64, ""),
        ("cache-tokens", 49152, "that the cache holds at CR 1"),
        ("prompt", 512, "tokens, against transformers"),
        ("new-tokens", 64, "against transformers"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=text)
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=[2048, 4096, 8192, 16384],
        metavar="N",
        help="tokens of a sequence before it decodes",
    )
    parser.add_argument("--method", choices=("dmc", "dms"), default="dmc", help="compression method")
    parser.add_argument("--window", type=int, default=256, help="tokens from a mark to the eviction, of dms")
    parser.add_argument(
        "--compression-ratios", type=float, nargs="+", default=[4.0], metavar="CR", help="of the compressed models"
    )
    parser.add_argument(
        "--kv-cache-dtype", choices=("int8", "fp8_e4m3"), help="of a second engine of each compressed model"
    )
    parser.add_argument("--seconds", type=float, default=30, help="of each comparison")
    args = parser.parse_args()
    began = time.perf_counter()
    device, dtype = resolve_device(args)
    backend = active_backend(device.type)
    print(
        f"{args.layers} layers of {args.hidden}, {args.heads} heads of {args.head_dim}, {dtype}, kernels: {backend}\n"
    )
    with tempfile.TemporaryDirectory() as name:
        models = {}
        for cr in dict.fromkeys([PLAIN.cr, *args.compression_ratios]):
            path = models[Variant(cr)] = write_model(Path(name), args, dtype, cr)
            if args.kv_cache_dtype and cr != PLAIN.cr:
                models[Variant(cr, args.kv_cache_dtype)] = path
        memory, missed = fixed_memory(models, args, device, dtype)
        reference, more = against_transformers(models[PLAIN], args, device, dtype)
    finish(
        args, "engine", {"kernels": backend, "fixed_memory": memory, "transformers": reference}, [*missed, *more], began
    )


if __name__ == "__main__":
    run_script(main)
