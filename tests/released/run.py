#!/usr/bin/env python3
"""DMS models of NVIDIA's Model-Optimizer, computed by its own code and by this package.

    tests/released/run.py MODEL_OPTIMIZER [--fastdms FASTDMS] [--python PYTHON] [--environment DIR]

MODEL_OPTIMIZER is a checkout of github.com/NVIDIA/Model-Optimizer (a2fbac7 when this was written). Its code runs in an
environment of its own, with the transformers that it pins, on tiny random Qwen3 models and on a CPU; model_optimizer.py
beside this file says what that takes. The models are then read as they are, and imported and exported; logits must be
within 1e-4 and generated tokens the same, and every head must hold as many tokens.

FASTDMS is a checkout of github.com/shisa-ai/FastDMS (c602b0e): which tokens are alive, by its functions, is compared
with what a cache holds here. --python: an interpreter that has torch and transformers 4.57.3; without it an environment
is made in DIR, or in a temporary folder. Exit status 1 when something differs.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "versions")]

TRANSFORMERS = "4.57.3"
"""Version that Model-Optimizer's experimental/dms/pyproject.toml pins."""
TOLERANCE = 1e-4


class Outcome:
    """Differences that were measured, printed as they come."""

    def __init__(self) -> None:
        self.failed = False

    def close(self, what: str, found: Tensor, wanted: Tensor) -> None:
        """Largest difference of logits or log-probabilities."""
        error = float((found - wanted).abs().max())
        self.failed |= not error <= TOLERANCE
        print(f"  {what:<58} {error:.1e}{'' if error <= TOLERANCE else '  DIFFERS'}", flush=True)

    def same(self, what: str, found: object, wanted: object) -> None:
        self.failed |= found != wanted
        print(f"  {what:<58} {'same' if found == wanted else f'DIFFERS: {found} and {wanted}'}", flush=True)


def compute_theirs(checkout: Path, folder: Path, python: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("model_optimizer.py")
    command = [str(python), str(script), str(checkout), str(folder)]
    subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)


def log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Of the tokens that follow: logits [b, s, V], ids [b, s] -> [b, s - 1]."""
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def check_their_own(expected: dict[str, Tensor]) -> None:
    """Print how far their prefill in pieces is from their prefill of the whole; no outcome of ours."""
    for name in ("by token", "by chunk", "by token mended", "by chunk mended"):
        error = float((expected[name] - expected["prefill"]).abs().max())
        print(f"  (theirs {name}, against theirs as a whole: {error:.1e})")


@torch.no_grad()
def check_training_checkpoint(path: Path, expected: dict[str, Tensor], outcome: Outcome) -> None:
    from megatron.dmc.evaluation.load import load_checkpoint
    from megatron.dmc.evaluation.reference import ReferenceDecoder

    loaded, ids = load_checkpoint(path), expected["ids"]
    positions = torch.arange(ids.size(1)).expand_as(ids)
    logits = loaded.model(ids, positions, step=loaded.step())
    outcome.close(
        "training checkpoint, teacher-forced", logits[..., : loaded.config.model.vocab_size], expected["prefill"]
    )
    decoder = ReferenceDecoder(loaded)
    steps = torch.stack([decoder.step(token) for token in ids[0].tolist()])
    outcome.close("training checkpoint, step by step over Python lists", steps, expected["prefill"][0])


def check_remote_code(path: Path, expected: dict[str, Tensor], outcome: Outcome) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True), expected["ids"]
    outcome.close("exported, in transformers: prefill", model(ids).logits, expected["prefill"])
    prompt, more = ids[:1, :20], len(expected["generated"])
    named = dict(do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0)
    result = model.generate(prompt, max_new_tokens=more, **named)
    outcome.same("exported, in transformers: tokens", result.sequences[0, 20:].tolist(), expected["generated"].tolist())
    outcome.close("exported, in transformers: generation", torch.cat(result.logits), expected["generated_logits"])
    lengths = result.past_key_values.lengths()[:, 0]
    outcome.same("exported, in transformers: tokens held by each head", lengths.tolist(), expected["lengths"].tolist())


def check_engine(path: Path, expected: dict[str, Tensor], outcome: Outcome) -> None:
    from megatron.dmc.inference import LLM, SamplingParams

    ids, more = expected["ids"], len(expected["generated"])
    llm = LLM(path, tokenizer=None, dtype="float32", max_num_batched_tokens=7)
    params = SamplingParams(temperature=0, max_tokens=more, ignore_eos=True, logprobs=1)
    (output,) = llm.generate(ids[0, :20].tolist(), params)
    (completion,) = output.outputs
    outcome.same("engine, read as it is: tokens", completion.token_ids, expected["generated"].tolist())
    found = torch.tensor([row.logprob for row in completion.logprobs])
    wanted = expected["generated_logits"].log_softmax(-1).amax(-1)
    outcome.close("engine, read as it is: log-probabilities", found, wanted)
    held = [list(layer) for layer in completion.cache.slots]
    outcome.same("engine, read as it is: tokens held by each head", held, expected["lengths"].tolist())


def check_model_optimizer(folder: Path, outcome: Outcome) -> None:
    from megatron.dmc.checkpoint import convert
    from megatron.dmc.evaluation.teacher_forced import TeacherForced

    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        print(f"Model-Optimizer, {path.name}", flush=True)
        expected = load_file(path / "expected.safetensors")
        (path / "expected.safetensors").unlink()
        check_their_own(expected)
        scored = TeacherForced.load(path).score(expected["ids"])
        outcome.close("evaluation, read as it is", scored.log_prob, log_probs(expected["prefill"], expected["ids"]))
        quiet = convert.Progress(say=lambda text: None)
        convert.import_hf(path, folder / "imported" / path.name, progress=quiet)
        check_training_checkpoint(folder / "imported" / path.name, expected, outcome)
        convert.export(folder / "imported" / path.name, folder / "exported" / path.name, progress=quiet)
        check_remote_code(folder / "exported" / path.name, expected, outcome)
        check_engine(path, expected, outcome)


def without_triton(checkout: Path) -> ModuleType:
    """FastDMS's ``engine/dms.py`` as a module. It decorates a kernel, which does not run here, and the package around
    it needs flash-attn, so Triton is an empty stand-in and the package is not imported.
    """
    import importlib.util

    source = checkout / "fastdms" / "engine" / "dms.py"
    stand_in, language = ModuleType("triton"), ModuleType("triton.language")
    stand_in.jit, language.constexpr = lambda function: function, None  # type: ignore[attr-defined]
    stand_in.language = language  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("fastdms_dms", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules |= {"triton": stand_in, "triton.language": language, "fastdms_dms": module}
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["triton"], sys.modules["triton.language"]
    return module


@torch.no_grad()
def check_fastdms(checkout: Path, folder: Path, outcome: Outcome) -> None:
    """Which tokens are alive after each token, by FastDMS's functions on our queries, and in our cache."""
    from helpers import dms_models
    from transformers import AutoModelForCausalLM

    from megatron.dmc.checkpoint import convert

    print("FastDMS", flush=True)
    theirs, path = without_triton(checkout), dms_models.fastdms(folder / "fastdms")
    quiet = convert.Progress(say=lambda text: None)
    convert.import_hf(path, folder / "imported" / "fastdms", progress=quiet)
    convert.export(folder / "imported" / "fastdms", folder / "exported" / "fastdms", progress=quiet)
    metadata = theirs.load_dms_metadata(path)
    model = AutoModelForCausalLM.from_pretrained(folder / "exported" / "fastdms", trust_remote_code=True)
    block, config = model.config.dmc, model.config
    read = (metadata.window_size, metadata.alpha_scale, metadata.alpha_offset)
    outcome.same("metadata", (block["window"], block["decision_scale"], block["decision_bias"]), read)
    queries: dict[int, Tensor] = {}
    for n, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_hook(lambda _, args, out, n=n: queries.__setitem__(n, out[0]))
    ids = torch.randint(1, config.vocab_size, (1, 100), generator=torch.Generator().manual_seed(1))
    model(ids)
    sizes = dict(num_kv_heads=config.num_key_value_heads, num_qo_heads=config.num_attention_heads)
    rule = dict(head_dim=config.head_dim, alpha_scale=metadata.alpha_scale, alpha_offset=metadata.alpha_offset)
    evicted = [theirs.extract_dms_eviction_decisions(queries[n], **sizes, **rule)[1].T for n in sorted(queries)]
    alive, held, cache = [], [], None
    for t in range(ids.size(1)):
        cache = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).past_key_values
        marks = torch.stack(evicted)[..., : t + 1]
        alive.append(
            theirs.build_dms_live_mask(marks, current_position=t, window_size=metadata.window_size).sum(-1).tolist()
        )
        held.append(cache.lengths()[:, 0].tolist())
    outcome.same("tokens alive after each of 100 tokens, by head", held, alive)
    share = 1 - sum(map(sum, alive[-1])) / (100 * math.prod((len(alive[-1]), len(alive[-1][0]))))
    print(f"  ({share:.0%} of the tokens are gone at the end)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_optimizer", type=Path, help="checkout of NVIDIA/Model-Optimizer")
    parser.add_argument("--fastdms", type=Path, help="checkout of shisa-ai/FastDMS")
    parser.add_argument("--python", type=Path, help=f"interpreter with torch and transformers {TRANSFORMERS}")
    parser.add_argument("--environment", type=Path, help="where an environment is kept (default: a temporary folder)")
    args = parser.parse_args()
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as temporary:
        python = args.python
        if python is None:
            from run import make_environment  # tests/versions

            python = make_environment((args.environment or Path(temporary) / "environment").absolute(), TRANSFORMERS)
        folder = Path(temporary) / "models"
        compute_theirs(args.model_optimizer, folder, python)
        check_model_optimizer(folder, outcome)
        if args.fastdms:
            check_fastdms(args.fastdms, Path(temporary) / "fastdms", outcome)
    print("something differs" if outcome.failed else "all within 1e-4")
    return int(outcome.failed)


if __name__ == "__main__":
    sys.exit(main())
