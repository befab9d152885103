# Helpers that give each folder one target with explicit dependencies. Sources are found by folder:
# a new file needs no list.
include_guard()

option(SHOAL_TESTS "Build the tests" ON)
option(SHOAL_BENCH "Build the benchmarks" ON)
option(SHOAL_WERROR "Treat warnings as errors" ON)
set(SHOAL_SANITIZE "" CACHE STRING "address (with undefined) or thread: build everything under that sanitizer")

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_CXX_FLAGS_RELEASE "-O2 -g1")
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")

find_program(SHOAL_CCACHE ccache)
if(SHOAL_CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER "${SHOAL_CCACHE}")
  set(CMAKE_CUDA_COMPILER_LAUNCHER "${SHOAL_CCACHE}")
endif()

add_library(shoal_flags INTERFACE)
target_include_directories(shoal_flags INTERFACE "${PROJECT_SOURCE_DIR}" "${PROJECT_BINARY_DIR}/generated")
target_compile_options(shoal_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wno-missing-field-initializers -fno-math-errno -ffp-contract=off>
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${SHOAL_WERROR}>>:-Werror>)
if(SHOAL_SANITIZE STREQUAL "address")
  add_compile_options(-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1)
  add_link_options(-fsanitize=address,undefined)
elseif(SHOAL_SANITIZE STREQUAL "thread")
  add_compile_options(-fsanitize=thread -fno-omit-frame-pointer -O1)
  add_link_options(-fsanitize=thread)
elseif(SHOAL_SANITIZE)
  message(FATAL_ERROR "SHOAL_SANITIZE is '${SHOAL_SANITIZE}', not empty, address or thread")
endif()

# shoal_library(NAME [FOLDER dir] DEPS PUBLIC a b PRIVATE c): library of every source under dir.
function(shoal_library name)
  cmake_parse_arguments(ARG "" "FOLDER" "" ${ARGN})
  set(folder ${ARG_FOLDER})
  if(NOT folder)
    set(folder ${name})
  endif()
  cmake_parse_arguments(DEPS "" "" "DEPS;PUBLIC;PRIVATE" ${ARG_UNPARSED_ARGUMENTS})
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/${folder}/*.cc")
  if(name STREQUAL "core")
    list(FILTER sources EXCLUDE REGEX "/core/base/")
  endif()
  list(FILTER sources EXCLUDE REGEX "/launch/main\\.cc$")
  set(scope PUBLIC)
  if(sources)
    add_library(${name} STATIC ${sources})
  else()
    add_library(${name} INTERFACE)
    set(scope INTERFACE)
  endif()
  target_link_libraries(${name} ${scope} shoal_flags ${DEPS_PUBLIC})
  if(sources)
    target_link_libraries(${name} PRIVATE ${DEPS_PRIVATE})
  endif()
endfunction()

function(shoal_program name source)
  cmake_parse_arguments(ARG "" "" "DEPS" ${ARGN})
  if(EXISTS "${PROJECT_SOURCE_DIR}/${source}")
    add_executable(${name} ${source})
    target_link_libraries(${name} PRIVATE ${ARG_DEPS})
  endif()
endfunction()

# Every examples/*.cc is a program of its own.
function(shoal_examples)
  file(GLOB sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/examples/*.cc")
  foreach(source IN LISTS sources)
    cmake_path(GET source STEM stem)
    add_executable(example_${stem} ${source})
    target_link_libraries(example_${stem} PRIVATE launch)
  endforeach()
endfunction()

# kernels/cuda/*.cu, added to the kernels library where the toolkit is.
function(shoal_cuda_kernels)
  if(NOT SHOAL_HAVE_CUDA)
    return()
  endif()
  file(GLOB sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/kernels/cuda/*.cu")
  add_library(kernels_cuda STATIC ${sources})
  target_link_libraries(kernels_cuda PUBLIC base PRIVATE CUDA::cudart_static)
  # Where cublaslt_library.cu finds the library when a process first needs it.
  target_link_options(kernels_cuda INTERFACE "LINKER:-rpath,${CUDAToolkit_LIBRARY_DIR}")
  # One PTX for both machines: nothing here needs what only sm_90's has, and the front end runs once.
  set_target_properties(kernels_cuda PROPERTIES CUDA_ARCHITECTURES OFF CUDA_STANDARD 20 POSITION_INDEPENDENT_CODE ON)
  target_compile_options(kernels_cuda PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-gencode=arch=compute_80,code=[sm_80,sm_90,compute_80] --expt-relaxed-constexpr
      -DFMT_USE_CONSTEXPR=1  # fmt 9 takes nvcc for a compiler without it
      -Xcompiler=-Wall,-Wextra,-Wno-missing-field-initializers>
    $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${SHOAL_WERROR}>>:-Werror=all-warnings>)
  get_target_property(type kernels TYPE)
  if(type STREQUAL "INTERFACE_LIBRARY")
    target_link_libraries(kernels INTERFACE kernels_cuda)
  else()
    target_link_libraries(kernels PUBLIC kernels_cuda)
  endif()
endfunction()
