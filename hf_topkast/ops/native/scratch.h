// Memory of one thread that lives from call to call: fresh pages would cost more than the work on them.
#pragma once

#include <cstdint>

namespace hf_topkast {

// At least so many floats, aligned to a cache line; what an earlier call got is lost.
float* scratch(int64_t floats);

}  // namespace hf_topkast
