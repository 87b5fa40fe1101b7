# rotexport_plugins: what TensorRT loads, and rotexport_host, which drives it without TensorRT.
set(ROTEXPORT_LIBRARY_NAME rotexport_plugins_trt${ROTEXPORT_TENSORRT_MAJOR})
add_library(rotexport_plugins SHARED tensorrt/library.cpp tensorrt/fast_hadamard_plugin.cpp
                                     tensorrt/quantized_linear_plugin.cpp tensorrt/quantized_linear_signature.cpp
                                     tensorrt/attention_plugin.cpp tensorrt/attention_signature.cpp
                                     tensorrt/call_signature.cpp
                                     tensorrt/eviction_plugin.cpp tensorrt/eviction_signature.cpp
                                     tensorrt/fields.cpp tensorrt/judge.cpp tensorrt/report.cpp)
set_target_properties(rotexport_plugins PROPERTIES OUTPUT_NAME ${ROTEXPORT_LIBRARY_NAME}
                      LINK_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/tensorrt/exports.map)
target_link_libraries(rotexport_plugins PRIVATE rotexport_kernels rotexport_tensorrt)
target_link_options(rotexport_plugins PRIVATE -Wl,--version-script=${CMAKE_CURRENT_SOURCE_DIR}/tensorrt/exports.map
                    -Wl,--no-undefined)

add_library(rotexport_host SHARED host/c_api.cpp host/expressions.cpp host/host.cpp host/memory_${ROTEXPORT_DEVICE}.cpp)
target_link_libraries(rotexport_host PRIVATE rotexport_tensorrt ${CMAKE_DL_LIBS})
