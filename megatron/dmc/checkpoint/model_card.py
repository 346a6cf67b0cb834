"""Small files of an exported directory: tokenizer, README.md, modelling code."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Optional

from megatron.dmc import __version__
from megatron.dmc.checkpoint import mapping
from megatron.dmc.checkpoint.formats.base import Source
from megatron.dmc.checkpoint.manifest import SHARDS_FILE
from megatron.dmc.checkpoint.sentencepieces import begin_and_end, fast_tokenizer, from_model_file
from megatron.dmc.checkpoint.tokenizer_files import TOKENIZER_FILES, load_sentencepiece, sentencepiece_adds_bos
from megatron.dmc.checkpoint.tokenizer_files import tokenizer_files as pretrained_files

REMOTE_CODE = Path(__file__).parent / "remote_code"
"""Directory of the modelling files that a DMC model is exported with."""


def tokenizer_files(source: Source, tokenizer: Optional[str | Path], say: Callable[[str], None]) -> dict[str, bytes]:
    """Tokenizer and generation configuration of an exported directory, name -> content.

    Args:
        tokenizer: see :func:`convert.export`.
    """
    files = {k: v for k, v in source.files.items() if k not in ("config.json", SHARDS_FILE)}
    if tokenizer is None and any(name in files for name in TOKENIZER_FILES):
        return files
    path = Path(tokenizer or source.run.data.tokenizer or "")
    if tokenizer is not None and not path.exists():
        raise ValueError(f"tokenizer {tokenizer} does not exist; name a sentencepiece model or a tokenizer directory")
    if path.is_dir() and (tokenizer or source.run.data.tokenizer):
        files |= {name: file.read_bytes() for name, file in pretrained_files(path).items()}
    elif path.is_file():
        files |= _sentencepiece_files(path, say)
    if not any(name in files for name in TOKENIZER_FILES):
        say("warning: no tokenizer was found; give --tokenizer, or copy its files into the directory")
    return files


def _sentencepiece_files(path: Path, say: Callable[[str], None]) -> dict[str, bytes]:
    """Files for transformers from a sentencepiece model: the model, and which special tokens it has."""
    model = load_sentencepiece(path)
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id(), "pad": model.pad_id()}
    ids = {name: number for name, number in ids.items() if number >= 0}
    tokens = {f"{name}_token": model.id_to_piece(number) for name, number in ids.items()}
    adds_bos = "bos" in ids and sentencepiece_adds_bos(path)
    say(f"tokenizer {path}: puts {'BOS' if adds_bos else 'no BOS'} before a text (add_bos_token)")
    # As dmc data preprocess prepares data by default: nothing is added but BOS, not even a space that the model does
    # not add.
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": adds_bos, "add_eos_token": False, **tokens}
    files = {"tokenizer.model": path.read_bytes()}
    if pieces := from_model_file(files["tokenizer.model"]):
        tokenizer = fast_tokenizer(pieces)
        begin_and_end(tokenizer, bos=(tokens["bos_token"], ids["bos"]) if adds_bos else None)
        files["tokenizer.json"] = tokenizer.to_str().encode()
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        config |= {"legacy": False, "add_prefix_space": model.encode("x", out_type=str)[0].startswith("\u2581")}
    generation = {f"{name}_token_id": number for name, number in ids.items() if name != "unk"}
    return {
        **files,
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
        "generation_config.json": json.dumps(generation, indent=2).encode(),
    }


def front_matter(tags: Sequence[str], base_model: Optional[str] = None) -> list[str]:
    """Lines of a model card's YAML header."""
    named = [f"base_model: {json.dumps(base_model)}"] if base_model else []
    return ["---", "library_name: transformers", *named, "tags:", *(f"- {tag}" for tag in tags), "---"]


def method_text(source: Source) -> str:
    """Paragraph on how a retrofitted model compresses its cache, and to what ratio."""
    manifest, dmc = source.manifest, source.run.dmc
    measured = f"{manifest.measured_cr:.2f}" if manifest.measured_cr else "not measured"
    figures = f"Measured compression ratio at the end of training: {measured}. "
    if not dmc.evicts:
        return (
            f"Retrofitted with Dynamic Memory Compression (arXiv 2403.09636) to {manifest.target_cr:g}x: every KV head "
            "decides token by token to append to its cache or to merge into its last slot. "
            f"{figures}Decision bias {dmc.decision_bias:g}, window {dmc.window or 'unbounded'}."
        )
    who = "every KV head decides" if dmc.decision_per == "head" else "every layer decides"
    about = "itself" if dmc.decision_about == "self" else "the one before it"
    source_text = {
        "key": "the last channel of the key",
        "query": "the last channel of the first query head of the group",
        "adapter": "a linear layer of its own on the hidden state; the base's weights are left as they were",
    }[dmc.decision_source]
    return (
        f"Retrofitted with Dynamic Memory Sparsification (arXiv 2506.05345) to {manifest.target_cr:g}x: {who}, at "
        f"every token about {about}, whether it is evicted from the cache {dmc.window} tokens later. The decision is "
        f"read from {source_text}. {figures}Decision scale {dmc.decision_scale:g}, bias {dmc.decision_bias:g}."
    )


def model_card(source: Source) -> str:
    """README.md of an exported directory."""
    manifest, model = source.manifest, source.run.model
    lineage = " -> ".join([*manifest.lineage, manifest.stage])
    tags = [*(["dmc", "kv-cache-compression"] if source.is_dmc else []), source.family.model_type]
    lines = [*front_matter(tags), "", f"# {source.path.parent.name or 'model'}", ""]
    lines += [
        f"{source.family.model_type}, {model.num_layers} layers, hidden size {model.hidden_size}, "
        f"{model.num_attention_heads} "
        f"query and {model.kv_heads} KV heads. Exported by megatron.dmc {__version__} "
        f"from stage {manifest.stage}, step {manifest.iteration} (lineage: {lineage})."
    ]
    if manifest.stage in mapping.COMPRESSED_STAGES:
        lines += ["", method_text(source)]
    if source.is_dmc:
        lines += [
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True)',
            'tokenizer = AutoTokenizer.from_pretrained("DIR", trust_remote_code=False)  # needs no code',
            "```",
            "",
            "The weights are not those of a plain model: a loader that ignores the `dmc` block gives nonsense.",
        ]
    return "\n".join(lines) + "\n"
