#!/usr/bin/env bash
# torch 2.13.0: matmul of [s, 1, v] with a weight that needs no gradient repeats the weight for each of the s rows, where
# the axis of length 1 has an odd stride.
#
# A good engineer expects one product of matrices: the tensor is contiguous (is_contiguous() is True), since the stride of
# an axis of length 1 says nothing. matmul folds leading axes into rows when their strides multiply, looks at that stride
# all the same, and else expands the weight to [s, v, h] and calls bmm. With a weight that needs a gradient it always
# folds, so only frozen layers are hit: megatron-core's LinearWithFrozenWeight multiplies the gradient of its output by the
# weight, and elementwise products give such strides with one sequence per micro-batch.
#
# Seen on a CPU, s 1024, v 8192, h 576: 1.8 s instead of 0.15 s. contiguous() changes nothing; a tensor of its own does
# (torch.mul(..., out=torch.empty_like(x))). Exit status 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/matmul.py" <<'PYTHON'
import torch


def products(x, weight):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        x.contiguous().matmul(weight)
    return {event.name for event in profile.events()} & {"aten::mm", "aten::bmm"}


weight = torch.randn(64, 32)
plain = torch.randn(128, 1, 64)
odd = plain.as_strided((128, 1, 64), (64, 1, 1))
trained = weight.clone().requires_grad_()
found = [products(plain, weight), products(odd, weight), products(odd, trained)]
print(f"contiguous {odd.is_contiguous()}, equal {torch.equal(odd, plain)}: plain {found[0]}, odd {found[1]}, "
      f"odd, weight with a gradient {found[2]}")
raise SystemExit(0 if odd.is_contiguous() and found == [{"aten::mm"}, {"aten::bmm"}, {"aten::mm"}] else 1)
PYTHON
"$folder/venv/bin/python" "$folder/matmul.py"
echo "holds: a frozen weight is repeated for every row"
