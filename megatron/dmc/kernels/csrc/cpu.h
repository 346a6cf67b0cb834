// Table of one build of the CPU kernels, for their launcher.
//
// The kernels are compiled once per instruction set, from the same sources; the launcher picks a table at run time. They use no
// library templates, so that no function compiled for a newer CPU can replace the launcher's.
#pragma once
#include "params.h"

namespace dmc {

struct Kernels {
  const char* name;
  int (*decode)(const DecodeParams&);    // 0, or 1: out of memory
  int (*prefill)(const PrefillParams&);
  void (*decide)(const AppendParams&);   // merge, omega, slot_index, before
  void (*write)(const AppendParams&);    // everything else, after the pages were taken
  void (*norm)(const NormParams&);
  void (*silu)(const SiluParams&);
};

}  // namespace dmc
