#if defined(__AVX512BW__)
#include <csrc/kernels/linear_amx.h>

namespace torchquant::TORCHQUANT_TIER {

bool amx_product(const PackedProduct& p) { return p.rows >= kAmxRows && run_amx(p); }

}  // namespace torchquant::TORCHQUANT_TIER
#endif
