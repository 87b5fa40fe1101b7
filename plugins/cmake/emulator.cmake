# The kernels on the CPU. Undefined behaviour in a kernel (an index past a register array, a shift too far) ends the
# program with its line; what only a GPU leaves undefined is reported by the emulator itself.
set(ROTEXPORT_SANITIZERS -fsanitize=bounds,shift,signed-integer-overflow,integer-divide-by-zero,null
    -fno-sanitize-recover=all)
add_compile_definitions(ROTEXPORT_EMULATOR)
add_compile_options(-Wall -Wextra -Werror -g1)
add_compile_options(-O1)  # kernels are unrolled: compiling them takes longer than running them
add_compile_options(${ROTEXPORT_SANITIZERS})
add_link_options(${ROTEXPORT_SANITIZERS})

# Shared, so that the plugin library and the host that feeds it see one device.
add_library(rotexport_emulator SHARED emulator/clocks.cpp emulator/device.cpp emulator/fiber.cpp emulator/machine.cpp
                                      emulator/machine_async.cpp emulator/machine_block.cpp emulator/memory.cpp
                                      emulator/warpgroup.cpp)
set_target_properties(rotexport_emulator PROPERTIES CXX_VISIBILITY_PRESET default)
target_compile_options(rotexport_emulator PRIVATE -O2)

add_library(rotexport_planted_bugs SHARED ../tests/plugins/planted_bugs.cpp ../tests/plugins/planted_warpgroup_bugs.cpp)
target_link_libraries(rotexport_planted_bugs PRIVATE rotexport_emulator)
set_target_properties(rotexport_planted_bugs PROPERTIES CXX_VISIBILITY_PRESET default)

include(cmake/kernels.cmake)
target_link_libraries(rotexport_kernels PUBLIC rotexport_emulator)

add_library(rotexport_emulated_kernels SHARED ../tests/plugins/emulated_kernels.cpp
                                              ../tests/plugins/emulated_attention.cpp
                                              ../tests/plugins/emulated_eviction.cpp
                                              ../tests/plugins/emulated_quantized_linear.cpp)
target_link_libraries(rotexport_emulated_kernels PRIVATE rotexport_kernels)
set_target_properties(rotexport_emulated_kernels PROPERTIES CXX_VISIBILITY_PRESET default)

if(TARGET rotexport_tensorrt)
  target_include_directories(rotexport_tensorrt SYSTEM INTERFACE emulator/stub)
  include(cmake/library.cmake)
  target_link_libraries(rotexport_host PRIVATE rotexport_emulator)
else()
  message(STATUS "TENSORRT_ROOT is not set: the plugin library and its host are not built")
endif()
