// Decode attention: one query per sequence over all slots of its heads, and the recent tokens of a model that evicts. Two launches.
//
// `plan` cuts the heads of a layer into chunks of about equal length, by their lengths on the device. `attend` has as many blocks as
// the GPU holds at once; each takes the next chunk until none is left. The four warps of a block take 16 slots at a time in turn and
// add up at the end; a head of several chunks is added up by the block that finishes last, in the order of the chunks, so that
// no order of execution changes a bit.
//
// Elements of 16 bits go from memory into the registers in which the tensor cores want them, with no shared memory between: channels
// are only summed over, or only pass through, so they may be in any order, and each lane gets the 16 bytes that it can load at once.
#include "cuda.h"
#include "cuda_attention.cuh"

namespace {

using namespace dmc;

constexpr int kPlanThreads = 1024;
constexpr int kStep = kWarps * kTile;  // slots of a round of all warps; chunks begin at multiples of it
constexpr int kLeast = 2 * kStep;      // slots of a chunk at least, where its head has them
constexpr int kChunksPerBlock = 4;
constexpr int kPitch = 8;              // numbers behind a partial sum; a multiple of 16 bytes

struct Chunk {
  int item, row;     // item: sequence * heads + head; row below 0: padding
  int begin, end;    // places, see Slots
  int kept, tokens;  // slots of the head, and tokens that it has seen
  int chunks, index; // of the head, and this one's place among them
  int partial;       // place of the head's first partial result
};

// Layout of the workspace. A chunk's size is such that `limit` chunks hold all slots, and each item may begin one more. A head
// of several chunks is longer than that size, so all of these heads together have at most 2 * limit chunks.
struct Plan {
  int* count;      // [4]: chunks, chunks given out
  int* finished;   // [N * H * passes], chunks of a head that have their partial result
  Chunk* chunks;   // [items + limit]
  float* partials; // [2 * limit][g][D + kPitch]: unnormalised sum, highest score, total weight
  int64_t limit, bytes;
};

int64_t align(int64_t x) { return (x + 255) / 256 * 256; }

Plan plan_of(void* workspace, int64_t n, int64_t heads, int64_t groups, int64_t head_dim, int64_t blocks) {
  Plan p;
  int64_t items = n * heads, at = 0;
  char* base = (char*)workspace;
  auto take = [&](int64_t bytes) {
    char* x = base + at;
    at += align(bytes);
    return x;
  };
  p.limit = blocks * kChunksPerBlock;
  p.count = (int*)take(4 * sizeof(int));
  p.finished = (int*)take(items * groups * sizeof(int));
  p.chunks = (Chunk*)take((items + p.limit) * sizeof(Chunk));
  p.partials = (float*)take(2 * p.limit * groups * (head_dim + kPitch) * sizeof(float));
  p.bytes = at;
  return p;
}

struct Work {
  CudaDecode decode;
  Plan plan;
  int passes;  // over the query heads of a group
  int blocks;
};

__global__ void __launch_bounds__(kPlanThreads, 1) plan(const Work w) {
  __shared__ int shared[32];
  __shared__ long long sums[32];
  const Cache& c = w.decode.cache;
  int heads = (int)c.heads, items = (int)w.decode.n * heads;
  auto chunk_of = [&](int item) {  // all of a head
    Chunk x = {item, item < items ? w.decode.rows[item / heads] : -1};
    if (x.row < 0) return x;
    int64_t index = head_index(c, x.row, w.decode.layer, item % heads);
    x.kept = c.lengths[index], x.tokens = c.recent ? c.segment[index] : 0;
    x.end = Slots<float>::places(c, x.kept, x.tokens);
    return x;
  };
  long long total = 0;
  for (int item = threadIdx.x; item < items; item += blockDim.x) {
    total += chunk_of(item).end;
    for (int pass = 0; pass < w.passes; pass++) w.plan.finished[item * w.passes + pass] = 0;
  }
  total = block_sum(total, sums);
  long long size = (total + w.plan.limit - 1) / w.plan.limit;
  size = max((size + kStep - 1) / kStep * kStep, (long long)kLeast);
  int count = 0, partials = 0, all;
  for (int from = 0; from < items; from += blockDim.x) {
    Chunk x = chunk_of(from + threadIdx.x);
    int length = x.end;
    // As many chunks as the size asks for, about equally long. An empty head has one, which writes zeros.
    int chunks = x.item < items ? max((int)((length + size - 1) / size), 1) : 0;
    int each = chunks > 1 ? ((length + chunks - 1) / chunks + kStep - 1) / kStep * kStep : max(length, 1);
    if (chunks > 1) chunks = (length + each - 1) / each;
    int at = count + block_scan(chunks, shared, &all);
    count += all;
    int partial = partials + block_scan(chunks > 1 ? chunks : 0, shared, &all);
    partials += all;
    for (int n = 0; n < chunks; n++)
      w.plan.chunks[at + n] = {x.item, x.row, n * each, min(length, (n + 1) * each), x.kept, x.tokens, chunks, n, partial};
  }
  if (threadIdx.x == 0) {
    w.plan.count[0] = count;
    w.plan.count[1] = w.blocks;  // each block begins with the chunk of its own number
  }
}

template <class Core> __global__ void __launch_bounds__(32 * kWarps, Core::kBlocks) attend(const Work w) {
  using T = typename Core::Element;
  constexpr int Q = Core::kQueries;
  __shared__ __align__(16) Sums<Q, Core::kMaxD> sums;
  __shared__ int upcoming;
  __shared__ bool last;
  const CudaDecode& p = w.decode;
  const Cache& c = p.cache;
  int heads = (int)c.heads, groups = (int)p.groups, d = c.head_dim, units = d / 8, pitch = d + kPitch;
  bool aligned = is_aligned<T>(p.q), out_aligned = is_aligned<T>(p.out);
  int count = w.plan.count[0] * w.passes;
  for (int at = blockIdx.x; at < count; at = upcoming) {
    int next = threadIdx.x ? 0 : atomicAdd(w.plan.count + 1, 1);  // asked for now, wanted at the end
    Chunk chunk = w.plan.chunks[at / w.passes];
    int pass = at % w.passes, sequence = chunk.item / heads, head = chunk.item % heads;
    int first = head * groups + pass * Q, queries = min(Q, groups - pass * Q);
    Core core;
    core.begin(d, p.scale * kLog2E, aligned,
               [&](int j) { return j < queries ? row_of<const T>(p.q, sequence, first + j) : nullptr; });
    core.run(Slots<typename Core::Page>(c, max(chunk.row, 0), p.layer, head, chunk.kept, chunk.tokens), chunk.begin, chunk.end);
    core.finish(sums);
    __syncthreads();
    // [chunk of a head that has several][group][pitch]: sum, highest score, total
    float* partials = w.plan.partials + ((int64_t)chunk.partial * groups + pass * Q) * pitch;
    for (int unit = threadIdx.x; unit < queries * units; unit += blockDim.x) {
      int j = unit / units, channel = unit % units * 8;
      Mixed mixed;
#pragma unroll
      for (int warp = 0; warp < kWarps; warp++) {
        float x[8];
        load8(x, &sums.sum[warp][j][channel]);
        mixed.add(x, sums.top[warp][j], sums.total[warp][j]);
      }
      if (chunk.chunks == 1) {
        mixed.store(row_of<T>(p.out, sequence, first + j) + channel, out_aligned);
      } else {
        float* to = partials + (int64_t)chunk.index * groups * pitch + j * pitch;
        store8(to + channel, mixed.x);
        if (channel == 0) to[d] = mixed.top, to[d + 1] = mixed.total;
      }
    }
    if (chunk.chunks > 1) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) last = atomicAdd(w.plan.finished + chunk.item * w.passes + pass, 1) == chunk.chunks - 1;
      __syncthreads();
      if (last) {
        __threadfence();
        for (int unit = threadIdx.x; unit < queries * units; unit += blockDim.x) {
          int j = unit / units, channel = unit % units * 8;
          Mixed mixed;
          for (int n = 0; n < chunk.chunks; n++) {
            const float* part = partials + (int64_t)n * groups * pitch + j * pitch;
            float4 a = __ldcg((const float4*)(part + channel)), b = __ldcg((const float4*)(part + channel) + 1);
            float x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
            mixed.add(x, __ldcg(part + d), __ldcg(part + d + 1));
          }
          mixed.store(row_of<T>(p.out, sequence, first + j) + channel, out_aligned);
        }
      }
    }
    if (threadIdx.x == 0) upcoming = next;
    __syncthreads();
  }
}

int64_t blocks_of(int device) { return (int64_t)multiprocessors(device) * 4; }

template <class Core> const char* decode(Work w, void* stream) {
  w.passes = (int)((w.decode.groups + Core::kQueries - 1) / Core::kQueries);
  w.blocks = multiprocessors(w.decode.cache.device) * Core::kBlocks;
  const char* error = launch(plan, 1, kPlanThreads, 0, stream, w);
  return error ? error : launch(attend<Core>, w.blocks, 32 * kWarps, 0, stream, w);
}

template <class T, class S> const char* any(const Work& w, void* stream) {
  return w.decode.groups == 1 ? decode<AnyCore<T, S, 1>>(w, stream) : decode<AnyCore<T, S, 4>>(w, stream);
}

template <class T, class S> const char* decode(const Work& w, void* stream) {
  if constexpr (sizeof(T) == 2) switch (w.decode.cache.head_dim) {
    case 64: return decode<TensorCore<T, S, 64>>(w, stream);
    case 80: return decode<TensorCore<T, S, 80>>(w, stream);
    case 96: return decode<TensorCore<T, S, 96>>(w, stream);
    case 128: return decode<TensorCore<T, S, 128>>(w, stream);
    case 256: return decode<TensorCore<T, S, 256>>(w, stream);
  }
  return any<T, S>(w, stream);
}

}  // namespace

extern "C" int64_t dmc_cuda_decode_bytes(int64_t n, int64_t heads, int64_t groups, int64_t head_dim, int device) {
  return plan_of(nullptr, n, heads, groups, head_dim, blocks_of(device)).bytes;
}

extern "C" const char* dmc_cuda_decode(const dmc::CudaDecode& p, void* stream) {
  if (!p.n) return nullptr;
  dmc::OnDevice on(p.cache.device);
  Work w = {p, plan_of(p.workspace, p.n, p.cache.heads, p.groups, p.cache.head_dim, blocks_of(p.cache.device)), 0, 0};
  return dmc::with_types(p.cache, [&](auto t, auto s) { return decode<decltype(t), decltype(s)>(w, stream); });
}
