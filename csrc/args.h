// What kernels with noise take on host and device, which differ in how they hold the key: its
// words, or where they lie.
#pragma once

#include "numeric.h"

namespace flatkern {

// A range of global coordinates: the noise's address space.
template <class Key>
struct Block {
  Key key;
  int64_t rows, cols;
  uint64_t row_offset, col_offset;
};

template <class Key>
struct NoiseArgs {
  Block<Key> block;
  void* out;  // float [rows, cols], or int64 for the raw words
};

template <class Key>
struct PerturbArgs {
  Block<Key> block;
  const void* weight;
  void* out;  // may be weight itself: no pointer here is restrict
  Dtype weight_dtype, out_dtype;
  int64_t weight_stride, out_stride;  // between rows, in elements; columns are adjacent
  const float* row_scale;
  bool elementwise;
};

// A point of a plane: W + c z + d y, with the scale and the key of y here, all else in `perturb`,
// which is not elementwise and keeps the dtype.
template <class Key>
struct PlaneArgs {
  PerturbArgs<Key> perturb;
  Key key;
  const float* row_scale;
};

}  // namespace flatkern
