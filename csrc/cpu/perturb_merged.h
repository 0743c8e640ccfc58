// Row norm, scale and perturbation, a few rows at a time: the second pass over a row finds it in
// cache. Compiled once per instruction set.

namespace flatkern::cpu::FLATKERN_ISA {

void perturb_merged(const PerturbMergedArgs& args, int64_t row_begin, int64_t row_end) {
  const KeepDenormals keep;
  const PerturbArgs& perturb = args.perturb;
  const ColumnsFunction columns = perturb_function(perturb.weight_dtype, perturb.out_dtype);
  for (int64_t row = row_begin; row < row_end; row += kNormRows) {
    const int64_t end = row + kNormRows < row_end ? row + kNormRows : row_end;
    row_norm(args.row_norm, row, end);
    for (int64_t i = row; i < end; ++i) {
      columns(perturb, i, 0, perturb.block.cols, args.row_norm.norm[i]);
    }
  }
}

}  // namespace flatkern::cpu::FLATKERN_ISA
