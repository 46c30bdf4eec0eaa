// SHVIT_BEGIN_TARGET("avx2,fma") ... SHVIT_END_TARGET: compiles the functions between for more than the
// baseline.
#pragma once

#define SHVIT_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define SHVIT_BEGIN_TARGET(features) \
  SHVIT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define SHVIT_END_TARGET _Pragma("clang attribute pop")
#else
#define SHVIT_BEGIN_TARGET(features) _Pragma("GCC push_options") SHVIT_PRAGMA(GCC target(features))
#define SHVIT_END_TARGET _Pragma("GCC pop_options")
#endif
