// Matrix products by cuBLASLt with what follows them in the epilogue. Host code.
//
// cuBLASLt's matrices are column-major. A row-major y [n, m] is its D [m, n], whose rows are our columns: so its bias, one value a
// row of D, is one value a column of ours, and y = x wᵀ becomes D = op(A) B with A from w and B from x.
#pragma once

#include <cublasLt.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "cuda.cuh"

namespace vit_fast {

inline void check_cublas(const char* op, cublasStatus_t status, const char* doing) {
  STD_TORCH_CHECK(
      status == CUBLAS_STATUS_SUCCESS, op, ": cuBLASLt failed at ", doing, ": ", cublasLtGetStatusName(status), " (",
      cublasLtGetStatusString(status), ")");
}

inline cudaDataType_t cuda_type(ScalarType type) {
  return type == ScalarType::Float ? CUDA_R_32F : type == ScalarType::Half ? CUDA_R_16F : CUDA_R_16BF;
}

// y[b, n, m] = Σ_k x[b, n, k] w[m, k] with an epilogue. Everything of one dtype, sums in float32 (without TF32).
struct LtProduct {
  int64_t rows, columns, depth, batch = 1;
  const void *x, *w;
  void* y;
  int64_t x_row, y_row, w_row, w_step;                // elements; w_row or w_step is 1
  int64_t x_batch = 0, y_batch = 0;
  const void* residual = nullptr;                     // added (C, β = 1); not y
  int64_t residual_row = 0, residual_batch = 0;       // 0: the same for the whole batch
  const void* bias = nullptr;                         // [columns]
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  void* aux = nullptr;                                // pre-activations [rows, columns], written or read by the epilogue
  void* bias_gradient = nullptr;                      // [columns]
  ScalarType type;
};

// Owns one of cuBLASLt's descriptors.
template <class Handle, cublasStatus_t (*destroy)(Handle)>
struct Descriptor {
  Handle handle = nullptr;
  Descriptor() = default;
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (handle != nullptr) destroy(handle);
  }
};
using MatmulDescriptor = Descriptor<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using Layout = Descriptor<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using Preference = Descriptor<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

// The largest power of two up to 256 that divides an address: part of what an algorithm may rely on.
inline uint32_t alignment_of(const void* data) {
  uint32_t alignment = 256;
  while (reinterpret_cast<uintptr_t>(data) % alignment != 0) alignment /= 2;
  return alignment;
}

class Lt {
 public:
  static Lt& instance() {
    static Lt lt;
    return lt;
  }

  void run(const char* op, const LtProduct& p, const Tensor& like) {
    const int device = like.get_device_index();
    const cudaStream_t stream = current_stream(like);
    cublasLtHandle_t handle = handle_of(op, device);

    MatmulDescriptor matmul;
    check_cublas(op, cublasLtMatmulDescCreate(&matmul.handle, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
    const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
      check_cublas(op, cublasLtMatmulDescSetAttribute(matmul.handle, attribute, &value, sizeof(value)), "cublasLtMatmulDescSetAttribute");
    };
    const bool transposed = p.w_step == 1;  // a row-major w is column-major [depth, columns]
    set(CUBLASLT_MATMUL_DESC_TRANSA, transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, p.epilogue);
    const void* bias = p.bias_gradient != nullptr ? p.bias_gradient : p.bias;
    if (bias != nullptr) {
      set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
      set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, cuda_type(p.type));
    }
    if (p.aux != nullptr) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, p.aux);
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, p.columns);
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE, cuda_type(p.type));
    }
    Layout a, b, c, d;
    const int64_t w_ld = std::max<int64_t>(transposed ? p.w_row : p.w_step, transposed ? p.depth : p.columns);
    make(op, a, p, transposed ? p.depth : p.columns, transposed ? p.columns : p.depth, w_ld, 0);
    make(op, b, p, p.depth, p.rows, std::max(p.x_row, p.depth), p.x_batch);
    make(op, d, p, p.columns, p.rows, std::max(p.y_row, p.columns), p.y_batch);
    const int64_t c_row = p.residual != nullptr ? p.residual_row : p.y_row;
    make(op, c, p, p.columns, p.rows, std::max(c_row, p.columns), p.residual != nullptr ? p.residual_batch : p.y_batch);

    constexpr size_t WORKSPACE = size_t(32) << 20;
    Tensor workspace = empty_like(like, {int64_t(WORKSPACE / 4)}, ScalarType::Float);
    const float one = 1.f, beta = p.residual != nullptr ? 1.f : 0.f;
    const void* c_data = p.residual != nullptr ? p.residual : p.y;
    const auto multiply = [&](const cublasLtMatmulAlgo_t& algorithm) {
      return cublasLtMatmul(
          handle, matmul.handle, &one, p.w, a.handle, p.x, b.handle, &beta, c_data, c.handle, p.y, d.handle, &algorithm,
          workspace.data_ptr(), WORKSPACE, stream);
    };

    const std::string key = key_of(p, device);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = algorithms_.find(key);
      if (found != algorithms_.end()) return check_cublas(op, multiply(found->second), "cublasLtMatmul");
    }
    Preference preference;
    check_cublas(op, cublasLtMatmulPreferenceCreate(&preference.handle), "cublasLtMatmulPreferenceCreate");
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
      check_cublas(
          op, cublasLtMatmulPreferenceSetAttribute(preference.handle, attribute, &value, sizeof(value)),
          "cublasLtMatmulPreferenceSetAttribute");
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(p.w));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(p.x));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(c_data));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(p.y));
    constexpr int MOST = 12;
    cublasLtMatmulHeuristicResult_t results[MOST];
    int count = 0;
    check_cublas(
        op,
        cublasLtMatmulAlgoGetHeuristic(
            handle, matmul.handle, a.handle, b.handle, c.handle, d.handle, preference.handle, MOST, results, &count),
        "cublasLtMatmulAlgoGetHeuristic");
    // Only a result whose state says so holds an algorithm.
    const auto last = std::remove_if(
        results, results + count, [](const cublasLtMatmulHeuristicResult_t& result) { return result.state != CUBLAS_STATUS_SUCCESS; });
    count = int(last - results);
    STD_TORCH_CHECK(count > 0, op, ": cuBLASLt has no algorithm for ", key);
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    cudaStreamIsCapturing(stream, &capturing);
    if (capturing != cudaStreamCaptureStatusNone) {  // nothing can be timed: the likeliest, for this graph alone
      return check_cublas(op, multiply(results[0].algo), "cublasLtMatmul");
    }
    // Once per shape: the operands are read, y is written the same each time.
    int best = -1;
    float best_ms = 0;
    cudaEvent_t start, stop;
    cudaEventCreate(&start);
    cudaEventCreate(&stop);
    for (int i = 0; i < count; ++i) {
      if (multiply(results[i].algo) != CUBLAS_STATUS_SUCCESS) continue;
      float ms = 0;
      for (int round = 0; round < 3; ++round) {
        float this_ms = 0;
        cudaEventRecord(start, stream);
        const cublasStatus_t status = multiply(results[i].algo);
        cudaEventRecord(stop, stream);
        cudaEventSynchronize(stop);
        cudaEventElapsedTime(&this_ms, start, stop);
        if (status == CUBLAS_STATUS_SUCCESS && (round == 0 || this_ms < ms)) ms = this_ms;
      }
      if (best < 0 || ms < best_ms) {
        best = i;
        best_ms = ms;
      }
    }
    cudaEventDestroy(start);
    cudaEventDestroy(stop);
    STD_TORCH_CHECK(best >= 0, op, ": none of cuBLASLt's ", count, " algorithms ran for ", key);
    check_launch(op);
    check_cublas(op, multiply(results[best].algo), "cublasLtMatmul");
    const std::lock_guard<std::mutex> lock(mutex_);
    algorithms_.emplace(key, results[best].algo);
  }

 private:
  cublasLtHandle_t handle_of(const char* op, int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    cublasLtHandle_t& handle = handles_[device];
    if (handle == nullptr) check_cublas(op, cublasLtCreate(&handle), "cublasLtCreate");
    return handle;
  }

  static void make(const char* op, Layout& layout, const LtProduct& p, int64_t rows, int64_t columns, int64_t ld, int64_t batch_stride) {
    check_cublas(
        op, cublasLtMatrixLayoutCreate(&layout.handle, cuda_type(p.type), uint64_t(rows), uint64_t(columns), ld),
        "cublasLtMatrixLayoutCreate");
    if (p.batch == 1) return;
    const int32_t count = int32_t(p.batch);
    const auto set = [&](cublasLtMatrixLayoutAttribute_t attribute, const auto& value) {
      check_cublas(op, cublasLtMatrixLayoutSetAttribute(layout.handle, attribute, &value, sizeof(value)), "cublasLtMatrixLayoutSetAttribute");
    };
    set(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, count);
    set(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, batch_stride);
  }

  static std::string key_of(const LtProduct& p, int device) {
    std::string key;
    for (const int64_t part :
         {int64_t(device), p.rows, p.columns, p.depth, p.batch, p.x_row, p.y_row, p.w_row, p.w_step, p.x_batch, p.y_batch,
          p.residual_row, p.residual_batch, int64_t(p.residual != nullptr), int64_t(p.bias != nullptr), int64_t(p.epilogue),
          int64_t(p.aux != nullptr), int64_t(p.type), int64_t(alignment_of(p.x)), int64_t(alignment_of(p.w)),
          int64_t(alignment_of(p.y)), int64_t(alignment_of(p.residual)), int64_t(alignment_of(p.bias)),
          int64_t(alignment_of(p.bias_gradient)), int64_t(alignment_of(p.aux))}) {
      key += std::to_string(part) + " ";
    }
    return key;
  }

  std::mutex mutex_;
  std::map<int, cublasLtHandle_t> handles_;  // live as long as the process, as torch's do
  std::map<std::string, cublasLtMatmulAlgo_t> algorithms_;
};

}  // namespace vit_fast
