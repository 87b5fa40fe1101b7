# Sink/window attention: prefill per type and head size, decoding per type and cache format.
target_sources(rotexport_kernels PRIVATE kernels/attention_plan.cpp)
rotexport_add_unit(attention_run kernels/attention_run.cu)
foreach(element device::Half device::BFloat16)
  string(REGEX REPLACE ".*::" "" short ${element})
  rotexport_add_unit(attention_cache_${short} kernels/attention_cache.cu ROTEXPORT_ELEMENT=${element})
  foreach(size 64 80 96 128 256)
    rotexport_add_unit(attention_prefill_${short}_${size} kernels/attention_prefill.cu
                       ROTEXPORT_ELEMENT=${element} ROTEXPORT_SIZE=${size})
  endforeach()
  foreach(format kFloat kInt8 kInt4 kInt2)
    rotexport_add_unit(attention_decode_${short}_${format} kernels/attention_decode.cu
                       ROTEXPORT_ELEMENT=${element} ROTEXPORT_FORMAT=${format})
  endforeach()
endforeach()
