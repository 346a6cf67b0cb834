#!/usr/bin/env bash
# megatron-core 0.16.1: reduce_from_tensor_model_parallel_region returns a tensor that is not contiguous as it came.
#
# A good engineer expects the sum over the tensor-parallel ranks, as for any other tensor, or an error. The function
# all-reduces a contiguous copy of its input and then returns the input: for a transposed view every rank gets its own
# part back, without a word. The same values in a contiguous tensor are summed.
#
# Seen (torch 2.13.0, gloo, two ranks that hold ones and twos):
#     contiguous: [[3.0, 3.0, 3.0], [3.0, 3.0, 3.0]]
#     transposed: [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]        on rank 0, twos on rank 1
# So a layer of your own must call .contiguous() before it. Exit status 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 megatron-core==0.16.1 numpy==2.2.6 packaging==26.3
cat > "$folder/ranks.py" <<'PYTHON'
import warnings

warnings.filterwarnings("ignore")
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

dist.init_process_group("gloo")
rank = dist.get_rank()
mine = torch.full((2, 3), rank + 1.0)
transposed = torch.full((3, 2), rank + 1.0).t()
assert torch.equal(mine, transposed) and not transposed.is_contiguous()
summed = reduce_from_tensor_model_parallel_region(mine, group=dist.group.WORLD)
returned = reduce_from_tensor_model_parallel_region(transposed, group=dist.group.WORLD)
if rank == 0:
    print("contiguous:", summed.tolist())
    print("transposed:", returned.tolist())
same = summed.eq(3).all() and returned.eq(rank + 1).all()
dist.destroy_process_group()
raise SystemExit(0 if same else 1)
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 "$folder/ranks.py"
echo "holds: a tensor that is not contiguous comes back unreduced"
