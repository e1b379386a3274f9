# Links targets so that they load on glibc 2.28 (RHEL 8, manylinux_2_28), on whatever Linux they are built.
#
# glibc 2.29 and 2.34 gave functions new versions, mostly by moving them into libc.so.6; a linker takes the newest. Stubs
# of the libraries that had them before, with the versions of that time, come first on the command line. They are used
# by the linker alone: what is loaded at run time is the system's library of that name, which has both versions.
set(D2V_OLD_libm.so.6 exp log pow)
set(D2V_OLD_libdl.so.2 dladdr dlclose dlerror dlopen dlsym dlvsym)
set(D2V_OLD_librt.so.1 shm_open shm_unlink)
set(D2V_OLD_libpthread.so.0
    pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join pthread_key_create
    pthread_key_delete pthread_kill pthread_mutex_trylock pthread_mutexattr_destroy pthread_mutexattr_init
    pthread_mutexattr_setpshared pthread_mutexattr_settype pthread_once pthread_rwlock_destroy pthread_rwlock_init
    pthread_rwlock_rdlock pthread_rwlock_timedrdlock pthread_rwlock_timedwrlock pthread_rwlock_tryrdlock
    pthread_rwlock_trywrlock pthread_rwlock_unlock pthread_rwlock_wrlock pthread_rwlockattr_destroy
    pthread_rwlockattr_init pthread_rwlockattr_setpshared pthread_setspecific pthread_spin_destroy pthread_spin_init
    pthread_spin_lock pthread_spin_trylock pthread_spin_unlock sem_destroy sem_init sem_post sem_timedwait sem_trywait
    sem_wait)
set(D2V_NEWER_libdl.so.2 dlmopen)  # than the oldest version on x86-64

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(D2V_OLD_VERSION GLIBC_2.2.5)
  set(D2V_NEWER_VERSION GLIBC_2.3.4)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  set(D2V_OLD_VERSION GLIBC_2.17)
  set(D2V_NEWER_VERSION GLIBC_2.17)
endif()
include(CheckSymbolExists)
check_symbol_exists(__GLIBC__ features.h D2V_HAS_GLIBC)  # musl has no versions

# The stub of one library, a target named like it.
function(add_stub library)
  set(code)
  foreach(kind OLD NEWER)
    foreach(name ${D2V_${kind}_${library}})
      string(APPEND code "extern \"C\" void ${name}() {}\n")
      string(APPEND names_${D2V_${kind}_VERSION} " ${name};")
    endforeach()
  endforeach()
  set(map "${D2V_OLD_VERSION} {${names_${D2V_OLD_VERSION}} };\n")
  if(D2V_NEWER_${library} AND NOT D2V_NEWER_VERSION STREQUAL D2V_OLD_VERSION)
    string(APPEND map "${D2V_NEWER_VERSION} {${names_${D2V_NEWER_VERSION}} };\n")
  endif()
  set(stub "${CMAKE_CURRENT_BINARY_DIR}/stubs/${library}")
  file(CONFIGURE OUTPUT "${stub}.cpp" CONTENT "${code}")
  file(CONFIGURE OUTPUT "${stub}.map" CONTENT "${map}")
  add_library(${library} SHARED "${stub}.cpp")
  target_compile_options(${library} PRIVATE -fno-builtin -fvisibility=default -w)
  target_link_options(${library} PRIVATE -nostdlib "LINKER:--version-script=${stub}.map,-soname,${library}")
  set_target_properties(${library} PROPERTIES NO_SONAME TRUE LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/stubs")
endfunction()

# Makes `target` load on old systems; libraries: those of the stubs that it needs.
function(link_for_old_systems target)
  if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux" OR NOT D2V_HAS_GLIBC OR NOT D2V_OLD_VERSION OR D2V_SANITIZE)
    return()
  endif()
  target_sources(${target} PRIVATE csrc/core/old_systems.cpp)
  # A static library that comes later may be the one that needs a stub.
  target_link_options(${target} PRIVATE LINKER:--no-as-needed)
  foreach(library ${ARGN})
    if(NOT TARGET ${library})
      add_stub(${library})
    endif()
    target_link_libraries(${target} PRIVATE ${library})
  endforeach()
endfunction()
