// Scratch memory for the C functions, which get a stream and no tensor.
#pragma once

#include "../host/common.h"

namespace qlora_ext::host {

// `bytes` from torch's allocator, on the current device, 256-byte aligned. It may be freed as soon
// as the work that uses it is enqueued: torch gives it only to later work of the same stream, a
// cudaStream_t. register.cpp defines it.
Tensor stream_workspace(const char* op, int64_t bytes, void* stream);

}  // namespace qlora_ext::host
