// float16 as the compiler has it: conversions round to nearest, ties to even, and overflow to infinity.
#pragma once

struct __half {
  _Float16 value;
};
inline __half __float2half_rn(float value) { return {_Float16(value)}; }
inline float __half2float(__half value) { return float(value.value); }
