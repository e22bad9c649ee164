// The kernels' handlers without JAX: called with XLA's own frames, by requests on stdin, with answers on stdout.
//
//   name, arguments (type, rank, dims, data), results (type, rank, dims), attributes (name, type, 8 bytes) -> the results
//
// Counts and types are uint32, dims int64, all little-endian; types are XLA's numbers. Tasks run on threads of their own.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "xla/ffi/api/c_api.h"

#define KERNELS(X) X(product) X(rounded_product) X(mix_experts) X(attend_cache) X(attend_prompt)
#define DECLARE(name) extern "C" XLA_FFI_Error* name(XLA_FFI_CallFrame*);
KERNELS(DECLARE)

struct XLA_FFI_Error {
  std::string message;
};

namespace {

constexpr int kThreads = 3;
std::vector<std::thread> threads;

template <class T>
T read() {
  T value;
  if (fread(&value, sizeof value, 1, stdin) != 1) exit(0);
  return value;
}

std::string read_word() {
  std::string word(read<uint32_t>(), 0);
  if (word.size() && fread(word.data(), word.size(), 1, stdin) != 1) exit(1);
  return word;
}

size_t size_of(uint32_t type) {
  switch (type) {
    case XLA_FFI_DataType_S8: case XLA_FFI_DataType_U8: return 1;
    case XLA_FFI_DataType_BF16: return 2;
    case XLA_FFI_DataType_S64: return 8;
    default: return 4;
  }
}

struct Array {
  XLA_FFI_Buffer buffer{XLA_FFI_Buffer_STRUCT_SIZE, nullptr};
  std::vector<int64_t> dims;
  size_t bytes;

  // What is not written shows: every bit of a result is set.
  void make(bool with_data) {
    const uint32_t type = read<uint32_t>(), rank = read<uint32_t>();
    bytes = size_of(type);
    for (uint32_t i = 0; i < rank; ++i) dims.push_back(read<int64_t>()), bytes *= dims.back();
    buffer.dtype = XLA_FFI_DataType(type), buffer.rank = rank, buffer.dims = dims.data();
    if (posix_memalign(&buffer.data, 64, bytes + !bytes)) exit(1);
    memset(buffer.data, 0xFF, bytes);
    if (with_data && bytes && fread(buffer.data, bytes, 1, stdin) != 1) exit(1);
  }
  ~Array() { free(buffer.data); }
};

struct Attribute {
  std::string name = read_word();
  uint32_t type = read<uint32_t>();
  uint64_t value = read<uint64_t>();
  XLA_FFI_ByteSpan span{name.data(), name.size()};
  XLA_FFI_Scalar scalar{XLA_FFI_DataType(type), &value};
};

XLA_FFI_Error* start(XLA_FFI_ThreadPool_Schedule_Args* args) {
  threads.emplace_back(args->task, args->data);
  return nullptr;
}
XLA_FFI_Error* count(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = kThreads;
  return nullptr;
}
XLA_FFI_Error* create(XLA_FFI_Error_Create_Args* args) { return new XLA_FFI_Error{args->message}; }
void tell(XLA_FFI_Error_GetMessage_Args* args) { args->message = args->error->message.c_str(); }
void destroy(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }

XLA_FFI_Handler* handler(const std::string& name) {
#define FIND(kernel) if (name == #kernel) return kernel;
  KERNELS(FIND)
  fprintf(stderr, "there is no kernel %s\n", name.c_str());
  exit(1);
}

void answer(const XLA_FFI_Api& api) {
  XLA_FFI_Handler* call = handler(read_word());
  std::vector<Array> arrays(read<uint32_t>());
  for (Array& array : arrays) array.make(true);
  std::vector<Array> results(read<uint32_t>());
  for (Array& result : results) result.make(false);
  const uint32_t attributes = read<uint32_t>();
  std::vector<std::unique_ptr<Attribute>> named;
  for (uint32_t i = 0; i < attributes; ++i) named.push_back(std::make_unique<Attribute>());

  std::vector<void*> args, rets, values;
  std::vector<XLA_FFI_ByteSpan*> names;
  for (Array& array : arrays) args.push_back(&array.buffer);
  for (Array& result : results) rets.push_back(&result.buffer);
  for (auto& attribute : named) names.push_back(&attribute->span), values.push_back(&attribute->scalar);
  std::vector<XLA_FFI_ArgType> arg_types(args.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(rets.size(), XLA_FFI_RetType_BUFFER);
  std::vector<XLA_FFI_AttrType> attr_types(values.size(), XLA_FFI_AttrType_SCALAR);

  XLA_FFI_CallFrame frame{XLA_FFI_CallFrame_STRUCT_SIZE, nullptr, &api, nullptr, XLA_FFI_ExecutionStage_EXECUTE};
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, int64_t(args.size()), arg_types.data(), args.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, int64_t(rets.size()), ret_types.data(), rets.data()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, int64_t(values.size()), attr_types.data(), names.data(), values.data()};
  XLA_FFI_Error* error = call(&frame);
  for (std::thread& thread : threads) thread.join();
  threads.clear();
  if (error) {
    fprintf(stderr, "%s\n", error->message.c_str());
    exit(1);
  }
  for (Array& result : results) fwrite(result.buffer.data, 1, result.bytes, stdout);
  fflush(stdout);
}

}  // namespace

int main() {
  XLA_FFI_Api api{XLA_FFI_Api_STRUCT_SIZE, nullptr};
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
  api.XLA_FFI_Error_Create = create;
  api.XLA_FFI_Error_GetMessage = tell;
  api.XLA_FFI_Error_Destroy = destroy;
  api.XLA_FFI_ThreadPool_Schedule = start;
  api.XLA_FFI_ThreadPool_NumThreads = count;
  for (;;) answer(api);
}
