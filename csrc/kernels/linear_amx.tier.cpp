// Products by tiles: a file of its own, because both this and linear.tier.cpp compile for long.
#if defined(__AVX512BW__)
#include <csrc/kernels/linear_amx.h>

namespace torchquant::TORCHQUANT_TIER {

bool tile_product(const PackedProduct& p) { return p.rows >= kAmxRows && run_amx(p); }

}  // namespace torchquant::TORCHQUANT_TIER
#endif
