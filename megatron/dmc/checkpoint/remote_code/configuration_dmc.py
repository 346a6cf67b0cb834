"""Configuration of a language model whose key-value cache is compressed by DMC (arXiv 2403.09636) or DMS (arXiv
2506.05345).

This file lies in a model directory, beside ``modeling_dmc.py``, ``cache_dmc.py`` and ``cache_dms.py``; transformers
reads them when it is told ``trust_remote_code=True``. The export of the megatron.dmc package has put it there, but it
needs nothing of it.

``config.json`` is that of the plain model (Llama, Mistral, Qwen 2, Qwen 3) with a ``dmc`` block:

    format_version      of this block; a file refuses what is newer than itself
    base_model_type     the plain model's model_type
    method              dmc (merges tokens) or dms (evicts them); dmc where it is left out
    decision_bias       b: a token is merged or marked when the decision's x, times decision_scale, is above b
    decision_source     what x is: key (its last channel; all that dmc has), query (that of the first one of the head's
                        group) or adapter; key where it is left out
    decision_about      whether the token before or itself is marked: previous or self; previous where it is left out
    decision_per        who decides with an adapter: head or layer; head where it is left out
    decision_scale      factor on x; 1 where it is left out
    window              W. dmc: tokens that a merged slot averages over; null: all of them. dms: age in tokens up to
                        which a marked token is seen
    importance_epsilon  added to every token's weight in that average
    add_qkv_bias        the projections of query, key and value have a bias (Qwen 2)
    qk_layernorm        every query and key head goes through an RMSNorm (Qwen 3)
    stage, step         where in its training the model is; retrofit and finetune compress, zero_out does not yet
    target_cr           compression ratio, tokens / slots, that it was trained to
    measured_cr         what was measured on held-out text
"""

from transformers import PretrainedConfig

FORMAT_VERSION = 1
STAGES = {"zero_out": False, "calibrate": True, "retrofit": True, "finetune": True}  # does the stage compress?
DECISIONS = {  # values of the method dms, the first one where the block has none
    "decision_source": ("key", "query", "adapter"),
    "decision_about": ("previous", "self"),
    "decision_per": ("head", "layer"),
}
REQUIRED = ("decision_bias", "window", "importance_epsilon", "stage")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
YARN = ("factor", "original_max_position_embeddings")


class DMCConfig(PretrainedConfig):
    """The plain model's configuration and the ``dmc`` block. Raises ``ValueError`` for what the model cannot do."""

    model_type = "dmc"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    has_no_defaults_at_init = True  # there is no model without a dmc block

    def __init__(
        self,
        dmc=None,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=None,
        head_dim=None,
        hidden_act="silu",
        max_position_embeddings=4096,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        use_cache=True,
        tie_word_embeddings=False,
        rope_theta=None,
        rope_scaling=None,
        rope_parameters=None,
        tokenizer_class="PreTrainedTokenizerFast",  # without one, pipeline() of transformers 4.50 loads no tokenizer
        **kwargs,
    ):
        self.dmc = checked_block(dmc)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.rope_parameters = checked_rope(rope_theta, rope_scaling, rope_parameters, max_position_embeddings)
        super().__init__(tie_word_embeddings=tie_word_embeddings, tokenizer_class=tokenizer_class, **kwargs)

    @property
    def compresses(self):
        """True when tokens are merged or evicted; False for a model that is only prepared for it (stage zero_out)."""
        return STAGES[self.dmc["stage"]]

    @property
    def evicts(self):
        """True for a model of the method dms."""
        return self.dmc.get("method", "dmc") == "dms"

    def to_diff_dict(self):
        """Keys that ``save_pretrained`` writes: those that transformers lacks, or has with another default.

        The inherited one compares with a configuration of defaults, of which there is none.
        """
        plain = PretrainedConfig().to_dict()
        always = ("model_type", "transformers_version", "tie_word_embeddings")  # the last one's default is not Llama's
        return {
            key: value
            for key, value in self.to_dict().items()
            if key in always or (not key.startswith("_") and (key not in plain or plain[key] != value))
        }


def checked_block(dmc):
    """The ``dmc`` block as a dict of its own, when this file understands it."""
    if not isinstance(dmc, dict):
        raise ValueError(f"config.json has no dmc block (found {dmc!r}); export the model again")
    version = dmc.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"the dmc block has format_version {version!r}, these files read up to {FORMAT_VERSION}; take "
            "configuration_dmc.py and modeling_dmc.py of a newer release"
        )
    missing = [key for key in REQUIRED if key not in dmc]
    if missing:
        raise ValueError(f"the dmc block lacks {', '.join(missing)}; export the model again")
    if dmc["stage"] not in STAGES:
        raise ValueError(
            f"the model is of stage {dmc['stage']!r}, which does not compress; export one of "
            f"{', '.join(STAGES)}, or use the plain model"
        )
    method, window = dmc.get("method", "dmc"), dmc["window"]
    if method not in ("dmc", "dms"):
        raise ValueError(f"the model was trained with method {method!r}, which these files do not compute")
    for key, values in DECISIONS.items():
        known = values if method == "dms" else values[:1]
        if dmc.get(key, values[0]) not in known:
            raise ValueError(f"the dmc block has {key} {dmc[key]!r}; method {method} knows {', '.join(known)}")
    source = dmc.get("decision_source", "key")
    if dmc["stage"] == ("zero_out" if source == "adapter" else "calibrate"):
        raise ValueError(
            f"the dmc block has stage {dmc['stage']!r}, which no model with decision_source {source!r} has"
        )
    if dmc.get("decision_per") == "layer" and source != "adapter":
        raise ValueError("the dmc block has decision_per 'layer'; only an adapter decides per layer")
    if method == "dmc" and dmc.get("decision_scale", 1) != 1:
        raise ValueError(f"the dmc block has decision_scale {dmc['decision_scale']!r}; method dmc has 1 only")
    if (window is None and method == "dms") or (window is not None and (not isinstance(window, int) or window < 1)):
        raise ValueError(
            f"the dmc block has window {window!r}; it is a number of tokens, at least 1, or for method dmc null"
        )
    return dict(dmc)


def checked_rope(theta, scaling, parameters, longest):
    """One dict from both styles: ``rope_theta`` and ``rope_scaling``, or transformers 5's ``rope_parameters``.

    longest: max_position_embeddings, the context before YaRN where the dict does not have it.
    """
    rope = {**(scaling or {}), **(parameters or {})}
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    rope = {"rope_type": kind, "rope_theta": theta or 10000.0, **rope}
    if kind == "yarn" and not rope.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = longest
    needed = {"default": (), "llama3": LLAMA3, "yarn": YARN}.get(kind)
    if needed is None:
        raise ValueError(f"rotary embeddings of type {kind!r} are unknown here; default and llama3 are known")
    missing = [key for key in needed if key not in rope]
    if missing:
        raise ValueError(f"rotary embeddings of type {kind} lack {', '.join(missing)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor is {rope['partial_rotary_factor']}; all channels of a head must rotate"
        )
    return rope
