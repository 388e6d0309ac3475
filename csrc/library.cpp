// Opens the operator namespace. Each room adds its own schemas with TORCH_LIBRARY_FRAGMENT at the
// foot of its file.
#include <torch/library.h>

TORCH_LIBRARY(torchquant, m) { (void)m; }
