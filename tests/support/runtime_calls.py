"""The functions of CUDA's runtime that the backend may call: none allocates or copies."""

RUNTIME_CALLS = {
    "cudaDeviceGetAttribute",
    "cudaFuncGetAttributes",
    "cudaFuncSetAttribute",
    "cudaGetDevice",
    "cudaGetErrorName",
    "cudaGetErrorString",
    "cudaGetLastError",
    "cudaLaunchKernel",
    "cudaMemsetAsync",
    "cudaStreamIsCapturing",
    "cudaStreamSynchronize",
}
