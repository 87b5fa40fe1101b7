# rotexport_kernels: every kernel, one compilation unit per instantiation so that they compile side by side.
add_library(rotexport_kernels STATIC kernels/fast_hadamard_plan.cpp kernels/quantized_linear_plan.cpp
                                     kernels/attention_planning.cpp)

# Adds one unit: a source compiled with the given definitions.
function(rotexport_add_unit name source)
  add_library(${name} OBJECT ${source})
  target_compile_definitions(${name} PRIVATE ${ARGN})
  if(ROTEXPORT_DEVICE STREQUAL emulator)
    set_source_files_properties(${source} PROPERTIES LANGUAGE CXX)
    target_compile_options(${name} PRIVATE -x c++)
  endif()
  target_sources(rotexport_kernels PRIVATE $<TARGET_OBJECTS:${name}>)
  set(ROTEXPORT_UNITS ${ROTEXPORT_UNITS} ${name} PARENT_SCOPE)
endfunction()

rotexport_add_unit(fast_hadamard_pack kernels/fast_hadamard_pack.cu)
rotexport_add_unit(fast_hadamard_run kernels/fast_hadamard_run.cu)
set(elements device::Half device::BFloat16 float)
foreach(element ${elements})
  foreach(output kSame kInt8 kInt4)
    string(REGEX REPLACE ".*::" "" short ${element})
    rotexport_add_unit(fast_hadamard_${short}_${output} kernels/fast_hadamard.cu
                       ROTEXPORT_ELEMENT=${element} ROTEXPORT_OUTPUT=${output})
  endforeach()
endforeach()

rotexport_add_unit(quantized_linear_run kernels/quantized_linear_run.cu)
foreach(format kW8A8 kW4A8 kW4A4)
  foreach(decodes false true)
    rotexport_add_unit(quantized_linear_${format}_${decodes} kernels/quantized_linear.cu
                       ROTEXPORT_FORMAT=${format} ROTEXPORT_DECODES=${decodes})
  endforeach()
endforeach()

include(cmake/attention.cmake)
include(cmake/eviction.cmake)
