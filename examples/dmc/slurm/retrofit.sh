#!/usr/bin/env bash
# Submits a whole retrofit: three jobs of retrofit.sbatch, each of which starts when the one before is finished.
#
#   CONFIG=llama2-7b.yaml DATA=data/train TOKENIZER=tokenizer.model CHECKPOINT=llama2-7b OUT=runs/llama2-7b TARGET_CR=4 \
#       SBATCH_ARGS='--nodes=4 --gpus-per-node=8 --time=4:00:00 --account=NAME' retrofit.sh [flags of all three stages]
#
# Prints the three job numbers. Run again, it goes on: a finished stage ends at once. Other variables: see retrofit.sbatch.
set -euo pipefail

CONFIG=${CONFIG:?set it to a file of examples/dmc/configs, or your own}
DATA=${DATA:?set it to the data: prefixes, or weight prefix weight prefix ...}
TOKENIZER=${TOKENIZER:?set it to the tokenizer that made the data}
CHECKPOINT=${CHECKPOINT:?set it to the original model, a checkpoint that convert.sbatch imported}
OUT=${OUT:?set it to a directory for zero_out, retrofit and finetune, on a file system that all nodes see}
TARGET_CR=${TARGET_CR:?set it to the compression ratio to reach, e.g. 4}
SBATCH_ARGS=${SBATCH_ARGS-}     # of all three jobs: --nodes, --gpus-per-node, --time, --account ...
ZERO_OUT_ARGS=${ZERO_OUT_ARGS-} # flags of one stage
RETROFIT_ARGS=${RETROFIT_ARGS-}
FINETUNE_ARGS=${FINETUNE_ARGS---lr-decay-style cosine --min-lr 3e-6} # the authors'

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
read -ra sbatch_args <<<"$SBATCH_ARGS"
export CONFIG DATA TOKENIZER SAVE INIT_FROM

for file in "$CONFIG" "$TOKENIZER" "$CHECKPOINT"; do
    [[ -e $file ]] || { echo "error: $file does not exist" >&2; exit 2; }
done
mkdir -p "$OUT"

after=()
INIT_FROM=$CHECKPOINT
stage() { # NAME FLAGS...: prints the job's number
    SAVE=$OUT/$1
    local job
    job=$(sbatch --parsable --job-name="dmc-$1" --output="$OUT/$1-%j.log" "${after[@]}" "${sbatch_args[@]}" \
        "$here/retrofit.sbatch" --stage "$@")
    job=${job%%;*} # of several clusters: number;name
    echo "$1: job $job, log $OUT/$1-$job.log"
    # afterok: a stage that failed or was cancelled cancels the rest. One that is queued again is waited for.
    after=(--dependency="afterok:$job" --kill-on-invalid-dep=yes)
    INIT_FROM=$SAVE
}
read -ra flags <<<"$ZERO_OUT_ARGS" && stage zero_out "$@" "${flags[@]}"
read -ra flags <<<"$RETROFIT_ARGS" && stage retrofit --target-cr "$TARGET_CR" "$@" "${flags[@]}"
read -ra flags <<<"$FINETUNE_ARGS" && stage finetune "$@" "${flags[@]}"
