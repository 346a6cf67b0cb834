#!/usr/bin/env bash
# transformers 5: AutoTokenizer asks whether a model's own code may run, for a tokenizer that has none.
#
# A good engineer expects AutoTokenizer.from_pretrained(directory) to need tokenizer.json and tokenizer_config.json, which
# name a class of transformers itself. Version 4 reads just these. Version 5 loads the model's configuration first; where
# config.json names code in the directory (auto_map), it asks on the terminal, "Do you wish to run the custom code? [y/N]",
# waits up to 15 seconds, and then, whatever the answer, loads the same tokenizer without that code. A program with a
# terminal, or a pipe that stays open, on its standard input stands still. trust_remote_code=False answers beforehand.
#
# Seen (Python 3.11):
#     4.57.6: asked 0 times, PreTrainedTokenizerFast
#     5.24.0: asked 1 times, TokenizersBackend
#     5.24.0 with trust_remote_code=False: asked 0 times, TokenizersBackend
# Exit status 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/ask.py" <<'PYTHON'
import builtins
import json
import pathlib
import sys

from tokenizers import Tokenizer, models, pre_tokenizers

directory = pathlib.Path(sys.argv[1])
directory.mkdir(exist_ok=True)
tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.save(str(directory / "tokenizer.json"))
(directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
auto_map = {"AutoConfig": "configuration_own.OwnConfig"}
(directory / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
(directory / "configuration_own.py").write_text(
    "from transformers import PretrainedConfig\n\n\nclass OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
)

asked = []


def answer(prompt=""):
    asked.append(prompt)
    return "n"


builtins.input = answer
import transformers

transformers.logging.set_verbosity_error()
named = {"trust_remote_code": False} if len(sys.argv) > 2 else {}
loaded = transformers.AutoTokenizer.from_pretrained(directory, **named)
assert loaded("a a")["input_ids"] == [1, 1]
with_what = " with trust_remote_code=False" if named else ""
print(f"{transformers.__version__}{with_what}: asked {len(asked)} times, {type(loaded).__name__}")
PYTHON
install() {
    python3 -m venv "$folder/$1"
    "$folder/$1/bin/pip" install --quiet --disable-pip-version-check "transformers==$1" 2> "$folder/pip.log" || {
        cat "$folder/pip.log"; exit 2; }
}
export HF_HUB_OFFLINE=1 HF_HOME="$folder/home"
install 4.57.6
install 5.24.0
{
    "$folder/4.57.6/bin/python" "$folder/ask.py" "$folder/model"
    "$folder/5.24.0/bin/python" "$folder/ask.py" "$folder/model"
    "$folder/5.24.0/bin/python" "$folder/ask.py" "$folder/model" False
} 2> "$folder/errors" | tee "$folder/seen" || { cat "$folder/errors"; exit 1; }
grep -q "^4.57.6: asked 0 times" "$folder/seen" || exit 1
grep -q "^5.24.0: asked 1 times" "$folder/seen" || exit 1
grep -q "^5.24.0 with trust_remote_code=False: asked 0 times" "$folder/seen" || exit 1
echo "holds: transformers 5 asks about the model's code before it loads a tokenizer that needs none"
