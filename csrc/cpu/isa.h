// The kernels for one instruction set; included by isa_*.cpp after the target is switched. All
// system headers come before that switch, so that nothing shared is compiled for it.

#include "simd.h"
// The order of use:
#include "noise.h"
#include "perturb.h"
#include "perturb_plane.h"
#include "row_norm.h"
#include "perturb_merged.h"
#include "bracket.h"
#include "residual.h"

namespace flatkern::cpu {

#define FLATKERN_STRING_(x) #x
#define FLATKERN_STRING(x) FLATKERN_STRING_(x)

static const Kernels kTable = {
    FLATKERN_STRING(FLATKERN_ISA),  FLATKERN_ISA::philox_bits,      FLATKERN_ISA::noise,
    FLATKERN_ISA::uniform,          FLATKERN_ISA::perturb,          FLATKERN_ISA::restore,
    FLATKERN_ISA::perturb_plane,    FLATKERN_ISA::row_norm,         FLATKERN_ISA::perturb_merged,
    FLATKERN_ISA::perturb_residual, FLATKERN_ISA::restore_residual,
};

}  // namespace flatkern::cpu
