"""Step time of plain requests beside structured ones.

A random model of 8 layers of 1,024 and a byte-level vocabulary decodes a batch of 16: all plain, or with 1, 8 or 16 of
them under a JSON schema, in turns. All requests of a batch wait for its masks, so the step is the plain ones' too.

Target: the median step with 8 of 16 under a schema takes less than 1.05 times that of plain ones.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import _common

sys.path.insert(0, str(_common.ROOT / "tests"))

from helpers.structured import byte_level_tokenizer

from megatron.dmc.inference import LLM, SamplingParams, StructuredOutputsParams

BATCH = 16
COUNTS = (0, 1, 8, 16)
TARGET = 1.05
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 400},
        "tags": {"type": "array", "items": {"type": "string"}},
        "kind": {"enum": ["a", "b", "c"]},
    },
    "required": ["name", "tags", "kind"],
    "additionalProperties": False,
}


def make_model(directory: Path, vocabulary: int) -> Path:
    """Directory of a model without weights: 8 layers of 1,024, and a tokenizer with tokens of random letters."""
    tokenizer = json.loads(byte_level_tokenizer().to_str())
    pieces, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    letters = [name for name in pieces if len(name) == 1 and name.isalnum()]
    level = letters
    while len(pieces) < vocabulary:
        longer = []
        for first in level:
            for second in letters:
                if len(pieces) < vocabulary and first + second not in pieces:
                    pieces[first + second] = len(pieces)
                    merges.append([first, second])
                    longer.append(first + second)
        level = longer
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(told))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "hidden_act": "silu"}
    config |= {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 16}
    config |= {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "vocab_size": vocabulary, "eos_token_id": [1, 2]}
    config |= {"max_position_embeddings": 1024, "tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def step_times(llm: LLM, structured: int, steps: int) -> list[tuple[float, float]]:
    """(seconds, seconds of processor time of all threads) of the decode steps of a batch with some structured ones."""
    engine, plain = llm.engine, {"max_tokens": steps, "ignore_eos": True, "temperature": 0.8}
    for index in range(BATCH):
        constraint = StructuredOutputsParams(json=SCHEMA) if index < structured else None
        engine.add_request(str(index), [3 + index] * 8, SamplingParams(**plain, structured_outputs=constraint))
    times = []
    while engine.has_unfinished():
        began, spent = time.perf_counter(), time.process_time()
        engine.step()
        if len(engine.scheduler.running) == BATCH and not engine.scheduler.waiting:
            times.append((time.perf_counter() - began, time.process_time() - spent))
    return times[2:]


def main() -> None:
    start = time.perf_counter()
    parser = _common.arguments(__doc__)
    parser.add_argument("--vocabulary", type=int, default=32_000, help="size of the vocabulary (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=24, help="decode steps of a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="batches of each kind (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(Path(folder) / "model", args.vocabulary)
        llm = LLM(path, load_format="dummy", max_num_seqs=BATCH, enable_prefix_caching=False)
        for count in COUNTS:
            step_times(llm, count, 4)  # the grammar is compiled, and memory is there
        times: dict[int, list[tuple[float, float]]] = {count: [] for count in COUNTS}
        for _ in range(args.rounds):
            for count in COUNTS:
                times[count] += step_times(llm, count, args.steps)
    medians = {count: [statistics.median(column) for column in zip(*times[count])] for count in COUNTS}
    print(f"vocabulary {args.vocabulary}, batch {BATCH}; medians")
    ratios = {}
    for count, (wall, spent) in medians.items():
        ratios[count] = wall / medians[0][0]
        print(
            f"{count:3} of {BATCH} structured: {1e3 * wall:7.1f} ms a step, {ratios[count]:.3f} times; processor time "
            f"{1e3 * spent:7.1f} ms, {spent / medians[0][1]:.3f} times"
        )
    missed = [f"8 of {BATCH} structured: {ratios[8]:.3f} times, not below {TARGET}"] if ratios[8] >= TARGET else []
    _common.finish(args, "structured_outputs", {"seconds": times, "ratios": ratios}, missed, start)


if __name__ == "__main__":
    _common.run_script(main)
