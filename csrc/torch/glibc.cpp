// libstdc++'s reference counts ask glibc 2.32 and newer whether the process has one thread. Answering "no" here, in the
// library itself, lets it load on older systems as well.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
