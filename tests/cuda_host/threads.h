// What the runtime tells its own parts about threads.
#pragma once

#include <string>

namespace cuda_host {

// The thread of the block that runs, or -1 outside of kernels.
int current_thread();

// " (file:line)" of the kernel's code that made a call, or "" where the tools to find it are missing.
std::string source_line(const void* caller);

}  // namespace cuda_host
