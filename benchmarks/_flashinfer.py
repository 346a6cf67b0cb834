"""Paged decode attention of FlashInfer on our cache: every KV head of every row is a sequence of its own, with one KV
head.
"""

import importlib.util
from collections.abc import Callable

import torch

from megatron.dmc.kernels import CacheState

WORKSPACE_BYTES = 256 * 2**20


def available() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


def decode_functions(
    state: CacheState, layer: int, q: torch.Tensor, scale: float
) -> dict[str, Callable[[], torch.Tensor]]:
    """Calls by kernel that attend from ``q`` ``[rows, query heads, D]`` to a layer and return ``[rows, KV heads, group,
    D]``.

    "flashinfer" multiplies on the ordinary cores, "flashinfer tc" on tensor cores, as FlashInfer advises for groups of
    four and more. What it plans on the host (split ranges, from lengths copied there) has been done before the first
    call; the kernels it is compared with plan on the GPU in every call.
    """
    import flashinfer

    lengths, page_size = state.lengths[:, layer].int(), state.page_size
    rows, heads = lengths.shape
    pages = (lengths + page_size - 1) // page_size
    held = torch.arange(state.page_table.size(3), device=q.device) < pages[..., None]
    indices = state.page_table[:, layer][held].int()
    indptr = torch.zeros(rows * heads + 1, dtype=torch.int32, device=q.device)
    indptr[1:] = pages.flatten().cumsum(0)
    last = (lengths - (pages - 1) * page_size).flatten().int()
    q = q.view(rows * heads, -1, q.size(-1))
    cache = (state.k_pages[:, :, None], state.v_pages[:, :, None])  # [pages, page size, 1 head, D]: its layout NHD
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for name, tensor_cores in (("flashinfer", False), ("flashinfer tc", True)):
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=tensor_cores)
        wrapper.plan(
            indptr,
            indices,
            last,
            q.size(1),
            1,
            q.size(2),
            page_size,
            q_data_type=q.dtype,
            kv_data_type=q.dtype,
            sm_scale=scale,
        )
        found[name] = lambda wrapper=wrapper: wrapper.run(q, cache).view(rows, heads, -1, q.size(-1))
    return found
