// Several tensors in one launch. Their arguments lie in a table that is the kernel's parameter, so
// that a launch needs no copy and a graph keeps what it was captured with; every tensor has blocks
// of its own, which share its work as those of a launch for it alone would.
#pragma once

#include <climits>
#include <vector>

#include "../philox.h"
#include "runtime.h"

namespace flatkern::cuda {

// What every driver takes as the parameters of a kernel.
constexpr size_t kParameterBytes = 4096;

template <class Args>
struct Table {
  // An entry has its arguments and its first block; before them all come the count and the end.
  static constexpr int kCapacity = static_cast<int>((kParameterBytes - 2 * sizeof(uint32_t)) /
                                                    (sizeof(Args) + sizeof(uint32_t)));
  uint32_t count;
  uint32_t first_block[kCapacity + 1];  // the last is the number of all blocks
  Args tensors[kCapacity];

  uint32_t blocks() const { return first_block[count]; }
};

// The tensor of a block, and which of that tensor's blocks it is.
struct Place {
  uint32_t tensor, block, blocks;
};
template <class Args>
FLATKERN_HD Place place_of(const Table<Args>& table, uint32_t block) {
  uint32_t tensor = 0;
  for (uint32_t end = table.count; end - tensor > 1;) {
    const uint32_t middle = (tensor + end) / 2;
    (table.first_block[middle] <= block ? tensor : end) = middle;
  }
  const uint32_t first = table.first_block[tensor];
  return {tensor, block - first, table.first_block[tensor + 1] - first};
}

// The launches for `tensors`: those of one `variant(tensor)`, which names a kernel, share tables,
// in order. A tensor has `blocks(tensor)` blocks; one without any is left out.
template <class Args, class Variant, class Blocks>
std::vector<Table<Args>> tables_of(const std::vector<Args>& tensors, const Variant& variant,
                                   const Blocks& blocks) {
  std::vector<Table<Args>> tables;
  std::vector<bool> placed(tensors.size());
  for (size_t first = 0; first < tensors.size(); ++first) {
    if (placed[first]) continue;
    const auto kernel = variant(tensors[first]);
    Table<Args>* table = nullptr;
    for (size_t i = first; i < tensors.size(); ++i) {
      if (placed[i] || variant(tensors[i]) != kernel) continue;
      placed[i] = true;
      const uint32_t own = blocks(tensors[i]);
      if (own == 0) continue;
      if (table == nullptr || table->count == Table<Args>::kCapacity ||
          own > static_cast<uint32_t>(INT_MAX) - table->blocks()) {
        table = &tables.emplace_back();
      }
      table->tensors[table->count] = tensors[i];
      table->first_block[table->count + 1] = table->blocks() + own;
      ++table->count;
    }
  }
  return tables;
}

}  // namespace flatkern::cuda
