// What newer compilers ask their libraries for, defined here, so that the libraries load on glibc 2.28 and the
// libstdc++ of GCC 8, as torch's own wheels do. cmake/old_systems.cmake does the same for functions whose version alone
// is newer.
#include <new>
#include <sstream>

// libstdc++'s reference counts ask glibc 2.32 and newer whether the process has one thread: the answer here is "no".
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

namespace std {

template basic_stringstream<char>::basic_stringstream();    // GLIBCXX_3.4.26
template basic_ostringstream<char>::basic_ostringstream();  // GLIBCXX_3.4.26

// GLIBCXX_3.4.29; weak, as a static libstdc++ has it too.
__attribute__((weak, visibility("hidden"))) void __throw_bad_array_new_length() { throw bad_array_new_length(); }

}  // namespace std
