# Products of 8-bit integers on Hopper's warpgroup instructions, where CUTLASS's headers are found: in CUTLASS_ROOT, or
# where tools/fetch_cutlass_headers.py puts them. Each of the four units takes 4 GB and most of a minute.
set(CUTLASS_ROOT "" CACHE PATH "directory that holds CUTLASS's headers, or whose include/ does")
find_path(ROTEXPORT_CUTLASS_INCLUDE cutlass/cutlass.h
          HINTS ${CUTLASS_ROOT} $ENV{CUTLASS_ROOT} ${CMAKE_CURRENT_SOURCE_DIR}/build/cutlass PATH_SUFFIXES include)
if(ROTEXPORT_CUTLASS_INCLUDE AND "90a" IN_LIST ROTEXPORT_ARCHITECTURES)
  set_property(GLOBAL PROPERTY JOB_POOLS cutlass=2)
  rotexport_add_unit(quantized_linear_hopper_run kernels/quantized_linear_hopper_run.cu)
  set(hopper_units quantized_linear_hopper_run)
  foreach(element half_t bfloat16_t)
    foreach(ends false true)
      set(unit quantized_linear_hopper_${element}_${ends})
      rotexport_add_unit(${unit} kernels/quantized_linear_hopper.cu ROTEXPORT_ELEMENT=cutlass::${element}
                         ROTEXPORT_ENDS=${ends})
      list(APPEND hopper_units ${unit})
    endforeach()
  endforeach()
  foreach(unit ${hopper_units})
    target_include_directories(${unit} SYSTEM PRIVATE ${ROTEXPORT_CUTLASS_INCLUDE})
    target_compile_options(${unit} PRIVATE "SHELL:-gencode arch=compute_90a,code=sm_90a")
    set_target_properties(${unit} PROPERTIES JOB_POOL_COMPILE cutlass)
  endforeach()
  target_compile_definitions(quantized_linear_run PRIVATE ROTEXPORT_HOPPER)
endif()
