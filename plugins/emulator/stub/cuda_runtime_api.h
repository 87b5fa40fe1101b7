// What TensorRT's headers need of the CUDA runtime, for builds without CUDA.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
