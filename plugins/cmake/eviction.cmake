# Attention that chooses what stays: products per type and head size, the rest per type.
target_sources(rotexport_kernels PRIVATE kernels/eviction_plan.cpp)
rotexport_add_unit(eviction_run kernels/eviction_run.cu)
foreach(element device::Half device::BFloat16)
  string(REGEX REPLACE ".*::" "" short ${element})
  rotexport_add_unit(eviction_cache_${short} kernels/eviction_cache.cu ROTEXPORT_ELEMENT=${element})
  foreach(size 64 80 96 128 256)
    rotexport_add_unit(eviction_products_${short}_${size} kernels/eviction_products.cu
                       ROTEXPORT_ELEMENT=${element} ROTEXPORT_SIZE=${size})
  endforeach()
endforeach()
