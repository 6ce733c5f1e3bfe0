// Simple loops, compiled for several CPUs, of which the loader of the library takes the best that it finds.
#pragma once

#include <cstdint>

// glibc's loader, and GCC, which knows these levels from version 12 on.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12
#define FOR_EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_CPU
#endif
