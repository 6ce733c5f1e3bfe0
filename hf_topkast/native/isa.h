// The instruction sets of this binary that this CPU can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace hf_topkast {

// Best first; never empty.
std::vector<const Kernels*> usable_kernels();

// Raises std::invalid_argument if `name` is not usable here.
const Kernels& kernels_named(const std::string& name);

}  // namespace hf_topkast
