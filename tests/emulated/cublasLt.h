// cuBLASLt's matrix products on the CPU, after NVIDIA's documentation: the comments of its own cublasLt.h, and
// https://docs.nvidia.com/cuda/cublas/#cublasltmatmul. Only what csrc/ uses; everything else, and what is documented as invalid, is
// refused. Matrices are column-major. Sums are float64, each result is rounded once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

enum cudaDataType_t : int32_t { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 };
enum cublasComputeType_t : int32_t { CUBLAS_COMPUTE_32F = 68 };
enum cublasOperation_t : int32_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum cublasStatus_t {
  CUBLAS_STATUS_SUCCESS = 0,
  CUBLAS_STATUS_NOT_INITIALIZED = 1,
  CUBLAS_STATUS_INVALID_VALUE = 7,
  CUBLAS_STATUS_NOT_SUPPORTED = 15
};
enum cublasLtEpilogue_t : uint32_t {
  CUBLASLT_EPILOGUE_DEFAULT = 1,
  CUBLASLT_EPILOGUE_BIAS = 4,
  CUBLASLT_EPILOGUE_GELU = 32,
  CUBLASLT_EPILOGUE_GELU_AUX = 32 | 128,
  CUBLASLT_EPILOGUE_GELU_BIAS = 32 | 4,
  CUBLASLT_EPILOGUE_GELU_AUX_BIAS = 32 | 128 | 4,
  CUBLASLT_EPILOGUE_DGELU = 64 | 128,
  CUBLASLT_EPILOGUE_DGELU_BGRAD = 64 | 128 | 16
};
enum cublasLtMatmulDescAttributes_t {
  CUBLASLT_MATMUL_DESC_TRANSA = 3,
  CUBLASLT_MATMUL_DESC_TRANSB = 4,
  CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
  CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,
  CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER = 11,
  CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD = 12,
  CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE = 22,
  CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE = 26
};
enum cublasLtMatrixLayoutAttribute_t { CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT = 5, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET = 6 };
enum cublasLtMatmulPreferenceAttributes_t {
  CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8
};

using cublasLtHandle_t = struct cublasLtContext*;
struct cublasLtMatmulDescOpaque_t {
  cublasComputeType_t compute;
  cudaDataType_t scale;
  int32_t transpose_a = CUBLAS_OP_N, transpose_b = CUBLAS_OP_N;
  uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  void *bias = nullptr, *aux = nullptr;
  int32_t bias_type = -1, aux_type = -1;  // -1: D's
  int64_t aux_ld = 0;
};
struct cublasLtMatrixLayoutOpaque_t {
  cudaDataType_t type;
  uint64_t rows, columns;
  int64_t ld;
  int32_t batch = 1;
  int64_t batch_stride = 0;
  bool operator==(const cublasLtMatrixLayoutOpaque_t&) const = default;
};
struct cublasLtMatmulPreferenceOpaque_t {
  uint64_t workspace = 0;
  uint32_t alignment[4] = {256, 256, 256, 256};  // of A, B, C, D
};
using cublasLtMatmulDesc_t = cublasLtMatmulDescOpaque_t*;
using cublasLtMatrixLayout_t = cublasLtMatrixLayoutOpaque_t*;
using cublasLtMatmulPreference_t = cublasLtMatmulPreferenceOpaque_t*;

struct cublasLtMatmulAlgo_t {
  uint64_t data[8];
};
struct cublasLtMatmulHeuristicResult_t {
  cublasLtMatmulAlgo_t algo;
  size_t workspaceSize;
  cublasStatus_t state;
  float wavesCount;
  int reserved[4];
};

// ---- Descriptors ----------------------------------------------------------------------------------------------------

inline const char* cublasLtGetStatusName(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    default: return "CUBLAS_STATUS_NOT_SUPPORTED";
  }
}

namespace emulated {
// Why the last product was refused, which cuBLASLt itself only logs.
inline const char* refused_because = "";
inline cublasStatus_t refuse(cublasStatus_t status, const char* why) {
  refused_because = why;
  return status;
}

template <class T>
cublasStatus_t put(T& field, const void* value, size_t size) {
  if (value == nullptr || size != sizeof(field)) return refuse(CUBLAS_STATUS_INVALID_VALUE, "an attribute of another size");
  std::memcpy(&field, value, size);
  return CUBLAS_STATUS_SUCCESS;
}
}  // namespace emulated

inline const char* cublasLtGetStatusString(cublasStatus_t) { return emulated::refused_because; }

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  static char context;
  return *handle = reinterpret_cast<cublasLtHandle_t>(&context), CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t compute, cudaDataType_t scale) {
  return *desc = new cublasLtMatmulDescOpaque_t{compute, scale}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) { return delete desc, CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatmulDescSetAttribute(
    cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute, const void* value, size_t size) {
  using emulated::put;
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return put(desc->transpose_a, value, size);
    case CUBLASLT_MATMUL_DESC_TRANSB: return put(desc->transpose_b, value, size);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return put(desc->epilogue, value, size);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return put(desc->bias, value, size);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return put(desc->bias_type, value, size);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER: return put(desc->aux, value, size);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD: return put(desc->aux_ld, value, size);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE: return put(desc->aux_type, value, size);
  }
  return emulated::refuse(CUBLAS_STATUS_INVALID_VALUE, "an unknown attribute");
}

inline cublasStatus_t cublasLtMatrixLayoutCreate(
    cublasLtMatrixLayout_t* layout, cudaDataType_t type, uint64_t rows, uint64_t columns, int64_t ld) {
  return *layout = new cublasLtMatrixLayoutOpaque_t{type, rows, columns, ld}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { return delete layout, CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatrixLayoutSetAttribute(
    cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t attribute, const void* value, size_t size) {
  using emulated::put;
  switch (attribute) {
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: return put(layout->batch, value, size);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: return put(layout->batch_stride, value, size);
  }
  return emulated::refuse(CUBLAS_STATUS_INVALID_VALUE, "an unknown attribute");
}

inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  return *preference = new cublasLtMatmulPreferenceOpaque_t, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  return delete preference, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
    cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute, const void* value, size_t size) {
  using emulated::put;
  switch (attribute) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: return put(preference->workspace, value, size);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES: return put(preference->alignment[0], value, size);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES: return put(preference->alignment[1], value, size);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES: return put(preference->alignment[2], value, size);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: return put(preference->alignment[3], value, size);
  }
  return emulated::refuse(CUBLAS_STATUS_INVALID_VALUE, "an unknown attribute");
}

// ---- What is refused ------------------------------------------------------------------------------------------------

namespace emulated {

constexpr uint32_t BIAS = 4, BGRAD = 16, GELU = 32, DGELU = 64, AUX = 128;  // the bits that epilogues are made of

struct Problem {
  const cublasLtMatmulDescOpaque_t& desc;
  const cublasLtMatrixLayoutOpaque_t &a, &b, &c, &d;
  bool transposed_a() const { return desc.transpose_a == CUBLAS_OP_T; }
  bool transposed_b() const { return desc.transpose_b == CUBLAS_OP_T; }
  uint64_t depth() const { return transposed_a() ? a.rows : a.columns; }
};

inline cublasStatus_t check(const Problem& p) {
  const auto invalid = [](const char* why) { return refuse(CUBLAS_STATUS_INVALID_VALUE, why); };
  const auto unsupported = [](const char* why) { return refuse(CUBLAS_STATUS_NOT_SUPPORTED, why); };
  const auto& [desc, a, b, c, d] = p;
  if (desc.compute != CUBLAS_COMPUTE_32F || desc.scale != CUDA_R_32F) return unsupported("only float32 sums are emulated");
  for (const auto* one : {&a, &b, &c, &d}) {
    if (one->type != CUDA_R_32F && one->type != CUDA_R_16F && one->type != CUDA_R_16BF) return invalid("an unknown type");
    if (one->rows == 0 || one->columns == 0) return invalid("an empty matrix");
    if (std::max(one->rows, one->columns) > 0x7fffffff) return unsupported("rows or columns beyond 32 bits");
    if (one->ld < int64_t(one->rows) && !(one == &c && one->ld == 0)) return invalid("a leading dimension below the rows");
    if (one->batch != d.batch || one->batch < 1) return invalid("batches of different sizes");
  }
  // Of what the table of types allows: all alike, or 16-bit operands with float32 results.
  if (a.type != b.type || c.type != d.type || (d.type != a.type && d.type != CUDA_R_32F)) return unsupported("types of A, B, C and D");
  if (d.rows != (p.transposed_a() ? a.columns : a.rows)) return invalid("D's rows are not op(A)'s");
  if (d.columns != (p.transposed_b() ? b.rows : b.columns)) return invalid("D's columns are not op(B)'s");
  if (p.depth() != (p.transposed_b() ? b.columns : b.rows)) return invalid("op(A)'s columns are not op(B)'s rows");
  if (c.rows != d.rows || c.columns != d.columns) return invalid("C is not of D's shape");
  if (d.batch > 1 && d.batch_stride < d.ld * int64_t(d.columns - 1) + int64_t(d.rows)) return invalid("D's matrices overlap");
  switch (desc.epilogue) {
    case CUBLASLT_EPILOGUE_DEFAULT:
    case CUBLASLT_EPILOGUE_BIAS:
    case CUBLASLT_EPILOGUE_GELU:
    case CUBLASLT_EPILOGUE_GELU_BIAS:
    case CUBLASLT_EPILOGUE_GELU_AUX:
    case CUBLASLT_EPILOGUE_GELU_AUX_BIAS:
    case CUBLASLT_EPILOGUE_DGELU:
    case CUBLASLT_EPILOGUE_DGELU_BGRAD: break;
    default: return invalid("an unknown epilogue");
  }
  if (desc.epilogue & (BIAS | BGRAD)) {
    if (desc.bias == nullptr) return invalid("an epilogue with a bias, and none is set");
    if (desc.bias_type != -1 && desc.bias_type != d.type) return unsupported("a bias that is not of D's type");
  }
  if (desc.epilogue & AUX) {
    if (desc.aux == nullptr) return invalid("an epilogue with GELU's input, and no buffer is set for it");
    if (desc.aux_type != -1 && desc.aux_type != d.type) return unsupported("GELU's input is not of D's type");
    if (desc.aux_ld % 8 != 0) return invalid("the leading dimension of GELU's input is not divisible by 8");
    if (desc.aux_ld < int64_t(d.rows)) return invalid("the leading dimension of GELU's input is below D's rows");
  }
  // Their batch strides, of the buffer and the gradient, are not emulated.
  if (d.batch > 1 && (desc.epilogue & (AUX | BGRAD))) return unsupported("such an epilogue in a batch");
  return CUBLAS_STATUS_SUCCESS;
}

inline uint32_t alignment_of(const void* data) {
  uint32_t alignment = 256;
  while (reinterpret_cast<uintptr_t>(data) % alignment != 0) alignment /= 2;
  return alignment;
}

// An algorithm is for the problem that it was asked for: for its layouts, its epilogue and these alignments.
struct Algorithm {
  uint64_t problem;
  uint32_t alignment[6];  // of A, B, C, D, the bias and GELU's input
};
static_assert(sizeof(Algorithm) <= sizeof(cublasLtMatmulAlgo_t));
constexpr size_t WORKSPACE = 4096;

inline uint64_t hash_of(const Problem& p) {
  uint64_t hash = 1469598103934665603u;
  const auto add = [&](uint64_t value) { hash = (hash ^ value) * 1099511628211u; };
  for (const auto* one : {&p.a, &p.b, &p.c, &p.d}) {
    for (const uint64_t value : {uint64_t(one->type), one->rows, one->columns, uint64_t(one->ld)}) add(value);
    add(uint64_t(one->batch));
    add(uint64_t(one->batch_stride));
  }
  for (const uint64_t value :
       {uint64_t(p.desc.transpose_a), uint64_t(p.desc.transpose_b), uint64_t(p.desc.epilogue), uint64_t(p.desc.bias_type),
        uint64_t(p.desc.aux_type), uint64_t(p.desc.aux_ld)}) {
    add(value);
  }
  return hash;
}

}  // namespace emulated

// The first of two is none, which its state tells.
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
    cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int requested, cublasLtMatmulHeuristicResult_t results[], int* count) {
  if (handle == nullptr) return emulated::refuse(CUBLAS_STATUS_NOT_INITIALIZED, "no handle");
  if (requested <= 0) return emulated::refuse(CUBLAS_STATUS_INVALID_VALUE, "no algorithm requested");
  const emulated::Problem problem = {*desc, *a, *b, *c, *d};
  *count = 0;
  if (const cublasStatus_t status = emulated::check(problem); status != CUBLAS_STATUS_SUCCESS) return status;
  emulated::Algorithm algorithm = {emulated::hash_of(problem), {}};
  std::copy_n(preference->alignment, 4, algorithm.alignment);
  algorithm.alignment[4] = emulated::alignment_of(desc->bias);
  algorithm.alignment[5] = emulated::alignment_of(desc->aux);
  if (requested > 1) {
    results[*count] = {};
    results[(*count)++].state = CUBLAS_STATUS_NOT_SUPPORTED;
  }
  if (preference->workspace < emulated::WORKSPACE) return CUBLAS_STATUS_SUCCESS;
  results[*count] = {{}, emulated::WORKSPACE, CUBLAS_STATUS_SUCCESS, 1.f, {}};
  std::memcpy(&results[(*count)++].algo, &algorithm, sizeof(algorithm));
  return CUBLAS_STATUS_SUCCESS;
}

// ---- The product ----------------------------------------------------------------------------------------------------

namespace emulated {

inline double read(const void* data, cudaDataType_t type, int64_t i) {
  if (type == CUDA_R_16F) return __half2float(static_cast<const __half*>(data)[i]);
  if (type == CUDA_R_16BF) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  return static_cast<const float*>(data)[i];
}
inline void write(void* data, cudaDataType_t type, int64_t i, double value) {
  if (type == CUDA_R_16F) {
    static_cast<__half*>(data)[i] = __float2half_rn(float(value));
  } else if (type == CUDA_R_16BF) {
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(float(value));
  } else {
    static_cast<float*>(data)[i] = float(value);
  }
}

// GELU in cuBLASLt is the tanh formula.
constexpr double ROOT = 0.79788456080286536, CUBIC = 0.044715;
inline double gelu(double x) {
  return 0.5 * x * (1 + std::tanh(ROOT * (x + CUBIC * x * x * x)));
}
inline double dgelu(double x) {
  const double t = std::tanh(ROOT * (x + CUBIC * x * x * x));
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * ROOT * (1 + 3 * CUBIC * x * x);
}

inline void multiply(const Problem& p, double alpha, const void* A, const void* B, double beta, const void* C, void* D) {
  const auto& [desc, a, b, c, d] = p;
  const int64_t rows = int64_t(d.rows), depth = int64_t(p.depth());
  std::vector<double> packed(size_t(rows * depth)), sums(size_t(rows), 0.), column(size_t(rows), 0.);
  for (int64_t batch = 0; batch < d.batch; ++batch) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t i = 0; i < rows; ++i) {
        packed[size_t(k * rows + i)] = read(A, a.type, batch * a.batch_stride + (p.transposed_a() ? k + i * a.ld : i + k * a.ld));
      }
    }
    for (int64_t j = 0; j < int64_t(d.columns); ++j) {
      std::fill(column.begin(), column.end(), 0.);
      for (int64_t k = 0; k < depth; ++k) {
        const double factor = read(B, b.type, batch * b.batch_stride + (p.transposed_b() ? j + k * b.ld : k + j * b.ld));
        for (int64_t i = 0; i < rows; ++i) column[size_t(i)] += packed[size_t(k * rows + i)] * factor;
      }
      for (int64_t i = 0; i < rows; ++i) {
        double value = alpha * column[size_t(i)];
        if (beta != 0) value += beta * read(C, c.type, batch * c.batch_stride + i + j * c.ld);  // not read for β = 0
        if (desc.epilogue & BIAS) value += read(desc.bias, d.type, i);
        if ((desc.epilogue & GELU) && (desc.epilogue & AUX)) write(desc.aux, d.type, i + j * desc.aux_ld, value);
        if (desc.epilogue & GELU) value = gelu(value);
        if (desc.epilogue & DGELU) value *= dgelu(read(desc.aux, d.type, i + j * desc.aux_ld));
        sums[size_t(i)] += value;
        write(D, d.type, batch * d.batch_stride + i + j * d.ld, value);
      }
    }
  }
  if (desc.epilogue & BGRAD) {
    for (int64_t i = 0; i < rows; ++i) write(desc.bias, d.type, i, sums[size_t(i)]);
  }
}

}  // namespace emulated

inline cublasStatus_t cublasLtMatmul(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha, const void* A, cublasLtMatrixLayout_t a, const void* B,
    cublasLtMatrixLayout_t b, const void* beta, const void* C, cublasLtMatrixLayout_t c, void* D, cublasLtMatrixLayout_t d,
    const cublasLtMatmulAlgo_t* algo, void* workspace, size_t workspace_size, cudaStream_t) {
  if (handle == nullptr) return emulated::refuse(CUBLAS_STATUS_NOT_INITIALIZED, "no handle");
  const auto invalid = [](const char* why) { return emulated::refuse(CUBLAS_STATUS_INVALID_VALUE, why); };
  const emulated::Problem problem = {*desc, *a, *b, *c, *d};
  if (const cublasStatus_t status = emulated::check(problem); status != CUBLAS_STATUS_SUCCESS) return status;
  if (C == D && !(*c == *d)) return invalid("in place, with two layouts");
  emulated::Algorithm algorithm;
  std::memcpy(&algorithm, algo, sizeof(algorithm));
  if (algorithm.problem != emulated::hash_of(problem)) return invalid("an algorithm for another problem");
  const void* const pointers[6] = {A, B, C, D, desc->bias, desc->aux};
  for (int i = 0; i < 6; ++i) {
    if (i < 4 && pointers[i] == nullptr) return invalid("a null matrix");
    if (reinterpret_cast<uintptr_t>(pointers[i]) % algorithm.alignment[i] != 0) return invalid("less aligned than its algorithm needs");
  }
  if (workspace_size < emulated::WORKSPACE || reinterpret_cast<uintptr_t>(workspace) % 16 != 0) return invalid("a workspace too small");
  std::memset(workspace, 0xff, emulated::WORKSPACE);
  emulated::multiply(problem, *static_cast<const float*>(alpha), A, B, *static_cast<const float*>(beta), C, D);
  return CUBLAS_STATUS_SUCCESS;
}
