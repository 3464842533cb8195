// The part of DLPack 1's C exchange table (https://dmlc.github.io/dlpack) that reading a tensor needs. It is how the
// addresses of torch tensors are reached without a torch header: torch >= 2.11 offers it as
// torch.Tensor.__dlpack_c_exchange_api__, a capsule named "dlpack_exchange_api".
#pragma once

#include <cstdint>

namespace fusedopt {
namespace dlpack {

struct Version {
  uint32_t major, minor;
};

struct Device {
  int32_t type, id;
};
constexpr int32_t kCPU = 1, kCUDA = 2, kCUDAHost = 3;

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5;

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* allocate;
  void* from_object_owning;
  void* to_object;
  // Fills `out` with pointers into the tensor: valid until control returns. 0, or -1 with a Python exception set.
  int (*from_object)(void* object, Tensor* out);
  void* current_stream;
};

}  // namespace dlpack
}  // namespace fusedopt
