#!/usr/bin/env bash
# kvpress 0.5.5: KVzip evicts the beginning of every context first where the tokenizer has a chat template.
#
# A good engineer expects a press that is entered around a forward pass to score every token of that pass; KVzip scores
# a token by how much the model attends to it while it repeats the context. It takes as many tokens off the front as the
# chat template puts before a user's message, whether the context begins with them or not, and never scores them. Their
# score stays 0, below that of any token that was scored, so they go first in every head; only the first four (n_sink)
# are kept. Without a template every token is scored.
#
# Seen (transformers 5.2.0, torch 2.13.0, random Llama of 2 layers with 2 KV heads, 40 plain tokens, a quarter evicted):
#     template of 12 tokens before the message: tokens 4 to 11 are evicted in 4 of 4 heads
#     no template: tokens that are evicted in all heads: none
# So take the template off the tokenizer for plain text, and count a system prompt as lost with it. Exit status 0 while
# this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.2.0 kvpress==0.5.5 numpy==2.4.6
cat > "$folder/press.py" <<'PYTHON'
import logging
import sys
import tempfile

import torch
import transformers
from kvpress import KVzipPress
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

transformers.logging.set_verbosity_error()
logging.disable(logging.WARNING)
words = [f"w{i}" for i in range(64)]
before = " ".join(words[:12])
template = before + "{% for m in messages %} {{ m.content }}{% endfor %} w62 w63"
torch.manual_seed(1)
sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
made = LlamaForCausalLM(LlamaConfig(vocab_size=65, max_position_embeddings=512, **sizes))


def evicted(chat_template):
    """Positions that a quarter's eviction takes from each head, of a context that is no chat."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, "<unk>"])}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", chat_template=chat_template)
        fast.save_pretrained(directory)
        made.save_pretrained(directory)
        model = LlamaForCausalLM.from_pretrained(directory, attn_implementation="sdpa").eval()
        tokens = torch.randint(0, 62, (1, 40), generator=torch.Generator().manual_seed(2))
        with torch.no_grad(), KVzipPress(compression_ratio=0.25)(model):
            model(tokens, past_key_values=DynamicCache())
        heads = []
        for layer in model.model.layers:
            _, head, position = layer.self_attn.masked_key_indices
            heads += [set(position[head == h].tolist()) for h in range(2)]
        return heads


with_template, without = evicted(template), evicted(None)
lost = sum(set(range(4, 12)) <= head for head in with_template)
print(f"template of 12 tokens before the message: tokens 4 to 11 are evicted in {lost} of {len(with_template)} heads")
common = sorted(set.intersection(*without))
print(f"no template: tokens that are evicted in all heads: {common or 'none'}")
sys.exit(not (lost == 4 and not set(range(4, 12)) <= set(common)))
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/press.py"
echo "holds: what stands where the template would stand is evicted unscored"
