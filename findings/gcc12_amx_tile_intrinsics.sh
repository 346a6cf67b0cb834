#!/usr/bin/env bash
# g++ 12.2: the intrinsics of AMX tiles do not say what memory they read, so what was written to it before is not written.
#
# A good engineer who writes a kernel for Intel's tiles fills a configuration of 64 bytes, calls _tile_loadconfig, packs
# values into a buffer and calls _tile_loadd on it, as Intel's examples do. The header amxtileintrin.h is inline assembly:
# the operand of ldtilecfg is declared as eight bytes, and that of tileloadd as an address in a register, without a
# "memory" clobber. The optimizer takes what is written elsewhere in that memory, to be read by nobody else, for dead.
#
# Seen (Debian 12, g++ 12.2.0-14+deb12u1), bytes that the machine code stores before the instruction:
#                                  as written      behind asm volatile("" ::: "memory")
#     configuration, local         17 to 20        64 and more (bytes that are stored twice count twice)
#     buffer for tileloadd         none            all of it (a loop's stores count once)
# That is -O1 to -O3; with -O0 a debug build works. A CPU with AMX would refuse the configuration, or take what lay on the
# stack. So: a configuration in static memory, and a compiler barrier between packing and loading.
# Exit status 0 while this holds, 1 when it has changed. Needs apt-get and dpkg (Debian 12, x86-64); nothing is installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
apt-get -qq -o APT::Sandbox::User=root download g++-12=12.2.0-14+deb12u1 libgcc-12-dev=12.2.0-14+deb12u1 \
    libisl23=0.25-1.1 libmpc3=1.3.1-1 libmpfr6=4.2.0-1 libgmp10=2:6.2.1+dfsg1-1.1
for package in ./*.deb; do dpkg -x "$package" root; done
gcc=root/usr/lib/gcc/x86_64-linux-gnu/12
export LD_LIBRARY_PATH=$folder/root/usr/lib/x86_64-linux-gnu

cat > tiles.cpp <<'CPP'
#define _IMMINTRIN_H_INCLUDED  // the tiles' header alone: the others want the C library's
#include <amxtileintrin.h>

struct alignas(64) Config {
    unsigned char palette, start_row, reserved[14];
    unsigned short bytes[16];
    unsigned char rows[16];
};

template <bool BARRIER>
[[gnu::always_inline]] inline void configure() {
    Config config = {};
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    if (BARRIER) asm volatile("" ::: "memory");
    _tile_loadconfig(&config);
}

template <bool BARRIER>
[[gnu::always_inline]] inline void load(const float *x) {
    alignas(64) float packed[256];
    for (int i = 0; i < 256; i++) packed[i] = 2 * x[i];
    if (BARRIER) asm volatile("" ::: "memory");
    _tile_loadd(0, packed, 64);
}

extern "C" void configure_plainly() { configure<false>(); }
extern "C" void configure_behind_a_barrier() { configure<true>(); }
extern "C" void load_plainly(const float *x) { load<false>(x); }
extern "C" void load_behind_a_barrier(const float *x) { load<true>(x); }
CPP
cat > count.py <<'PYTHON'
import re
import sys

WIDTH = {"b": 1, "w": 2, "l": 4, "q": 8, "s": 4}  # movss: the loop is not vectorized with -O1
STORE = re.compile(r"\s+(mov[a-z]*)\s+[^,]+, -?\d*\(%r(?:sp|ax|bp|dx|cx)[^)]*\)$")


def stored(assembly: str, name: str) -> int:
    """Bytes that instructions of a function store, each counted once (a loop's body too)."""
    body = assembly.split(f"\n{name}:\n")[1].split(f"\n\t.size\t{name}")[0]
    before = re.split(r"\tldtilecfg|\ttileloadd", body)[0]
    found = [m.group(1) for line in before.splitlines() if (m := STORE.match(line))]
    return sum(16 if op.startswith(("mova", "movu", "movdq")) else WIDTH[op[-1]] for op in found)


for level in sys.argv[1:]:
    text = open(f"tiles-{level}.s").read()
    names = ("configure_plainly", "configure_behind_a_barrier", "load_plainly", "load_behind_a_barrier")
    print(level, *(f"{name}: {stored(text, name)}" for name in names))
PYTHON
for level in O1 O2 O3; do
    "$gcc/cc1plus" -quiet "-$level" -mamx-tile -nostdinc -isystem "$gcc/include" tiles.cpp -o "tiles-$level.s"
done
python3 count.py O1 O2 O3 | tee seen
diff seen - <<'SEEN'
O1 configure_plainly: 20 configure_behind_a_barrier: 68 load_plainly: 0 load_behind_a_barrier: 4
O2 configure_plainly: 17 configure_behind_a_barrier: 73 load_plainly: 0 load_behind_a_barrier: 16
O3 configure_plainly: 17 configure_behind_a_barrier: 73 load_plainly: 0 load_behind_a_barrier: 16
SEEN
