# Configures, builds and runs the tests under a sanitizer.
#   cmake -DKIND=address|thread -DROOT=source -DBUILD=tree [-DGENERATOR=g] -P run.cmake
# address: AddressSanitizer with leaks, and UndefinedBehaviorSanitizer, over all tests but the long
#   ones and those under MPI.
# thread: ThreadSanitizer over the tests with ranks as threads, each rank with one thread of its own:
#   libgomp is not built with instrumentation, so the sanitizer cannot see that its barriers order
#   anything, and every parallel region would be a false report. Without the tests that start other
#   processes and those of one thread that take minutes.
cmake_minimum_required(VERSION 3.25)
cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
if(NOT GENERATOR)
  set(GENERATOR Ninja)
endif()

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "sanitizer ${KIND}: '${command}' ended with ${result}")
  endif()
endfunction()

run(${CMAKE_COMMAND} -S ${ROOT} -B ${BUILD} -G ${GENERATOR} -DSHOAL_SANITIZE=${KIND} -DSHOAL_CUDA=OFF -DSHOAL_BENCH=OFF)
if(KIND STREQUAL "address")
  set(ENV{ASAN_OPTIONS} detect_stack_use_after_return=1:strict_string_checks=1:detect_leaks=1)
  set(ENV{UBSAN_OPTIONS} print_stacktrace=1)
  set(ENV{LSAN_OPTIONS} suppressions=${ROOT}/tests/sanitize/leaks.txt:print_suppressions=0)
  run(${CMAKE_COMMAND} --build ${BUILD} --parallel ${cores})
  run(${CMAKE_CTEST_COMMAND} --test-dir ${BUILD} --output-on-failure --no-tests=error
      --parallel ${cores} -LE "long|mpi|lint|sanitizer")
elseif(KIND STREQUAL "thread")
  set(ENV{TSAN_OPTIONS} suppressions=${ROOT}/tests/sanitize/races.txt:halt_on_error=1:second_deadlock_stack=1)
  set(ENV{OMP_NUM_THREADS} 1)
  run(${CMAKE_COMMAND} --build ${BUILD} --parallel ${cores} --target base_test core_test optim_test parallel_test
      launch_test)
  foreach(program IN ITEMS base core optim parallel launch)
    run(${BUILD}/bin/${program}_test --gtest_brief=1
        --gtest_filter=-Long*:*DeathTest*:Mpi*:*Program*:Config*:Report*)
  endforeach()
else()
  message(FATAL_ERROR "KIND is '${KIND}', not address or thread")
endif()
