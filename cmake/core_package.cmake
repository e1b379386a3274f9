# csrc/core for C++ programs: `find_package(d2v)` gives the target d2v::core. Included by -DD2V_CORE_ONLY=ON.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)
file(STRINGS d2v_kernels/__init__.py D2V_VERSION REGEX "^__version__ = ")
string(REGEX REPLACE "[^0-9.]" "" D2V_VERSION "${D2V_VERSION}")
set(D2V_PACKAGE_FOLDER "${CMAKE_INSTALL_LIBDIR}/cmake/d2v")

add_library(core STATIC csrc/core/masks.cpp ${D2V_CORE_OBJECTS})
set_target_properties(core PROPERTIES OUTPUT_NAME d2v_core)
target_compile_features(core PUBLIC cxx_std_17)
target_include_directories(core INTERFACE "$<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>")
install(TARGETS core EXPORT d2vConfig ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}")
foreach(name attention convolution dispatch dtype ema gelu layers loss masks norm tokens)
  install(FILES csrc/core/${name}.h DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/d2v")
endforeach()
install(EXPORT d2vConfig NAMESPACE d2v:: DESTINATION "${D2V_PACKAGE_FOLDER}")
# Before 1.0 every minor version may change the functions.
write_basic_package_version_file("${CMAKE_CURRENT_BINARY_DIR}/d2vConfigVersion.cmake"
                                 VERSION "${D2V_VERSION}" COMPATIBILITY SameMinorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/d2vConfigVersion.cmake" DESTINATION "${D2V_PACKAGE_FOLDER}")
