#if defined(__AVX512BW__)
#include <csrc/kernels/linear_vnni.h>

namespace torchquant::TORCHQUANT_TIER {

void vnni_product_of_words(const PackedProduct& p) { run_vnni<true>(p); }

}  // namespace torchquant::TORCHQUANT_TIER
#endif
