// Calls the native entry points for a process on another machine (conftest.py), over stdin and
// stdout, and reports what they write outside their buffers. The entry points are those of the
// binding itself, argument checks included, compiled against the pybind11.h beside this file.
//
// A request is a Request, the sizes of its buffers (int64), its arguments, then what the buffers
// hold. The reply is a Reply and what they hold now. All numbers are little-endian, as both
// machines are.
#include "bindings.cpp"

namespace {

struct Request {
  char name[32];
  int64_t buffers, arguments;
};

// A number, or with a buffer >= 0 an address: `value` bytes into that buffer.
struct Argument {
  int64_t buffer, value;
};

struct Reply {
  int64_t status;
  int64_t overrun;  // the first buffer that was written outside, or -1
};

void read(void* target, size_t size) {
  if (std::fread(target, 1, size, stdin) != size) fail("the request is cut short");
}

void write(const void* source, size_t size) {
  if (std::fwrite(source, 1, size, stdout) != size) fail("nobody reads the reply");
}

// Memory of its own between two guards. They are NaN in every floating-point type, so that an
// element read too many shows in the result, and no two buffers have the same ones in the same
// place: a NaN read too many here and written too many there is seen as well.
class Buffer {
 public:
  Buffer(size_t size, size_t number) : number_(number), bytes_(size + 2 * guard) {
    for (size_t i = 0; i < guard; ++i) before()[i] = after()[i] = pattern(i);
  }

  unsigned char* data() { return bytes_.data() + guard; }
  size_t size() const { return bytes_.size() - 2 * guard; }

  bool overrun() {
    for (size_t i = 0; i < guard; ++i)
      if (before()[i] != pattern(i) || after()[i] != pattern(i)) return true;
    return false;
  }

 private:
  static constexpr size_t guard = 4096;

  unsigned char* before() { return bytes_.data(); }
  unsigned char* after() { return data() + size(); }

  // Bytes of the quiet NaNs 0x7FC0 to 0x7FFF, in which also the first half of a float is one.
  unsigned char pattern(size_t i) const {
    return i % 2 ? 0x7F : static_cast<unsigned char>(0xC0 | ((i / 2 + 5 * number_) & 0x3F));
  }

  size_t number_;
  std::vector<unsigned char> bytes_;
};

template <class T>
std::vector<T> read_all(int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  read(values.data(), values.size() * sizeof(T));
  return values;
}

void serve(pybind11::module_& module, Request& request) {
  request.name[sizeof(request.name) - 1] = 0;
  const auto entry_point = module.entry_points.find(request.name);
  if (entry_point == module.entry_points.end()) fail("the binding has no entry point of this name");
  const std::vector<int64_t> sizes = read_all<int64_t>(request.buffers);
  const std::vector<Argument> given = read_all<Argument>(request.arguments);
  std::vector<Buffer> buffers;
  for (const int64_t size : sizes) {
    buffers.emplace_back(static_cast<size_t>(size), buffers.size());
    read(buffers.back().data(), buffers.back().size());
  }
  std::vector<uint64_t> words;
  for (const Argument& argument : given) {
    const uint64_t value = static_cast<uint64_t>(argument.value);
    words.push_back(
        argument.buffer < 0
            ? value
            : reinterpret_cast<uintptr_t>(buffers[static_cast<size_t>(argument.buffer)].data()) +
                  value);
  }
  Arguments arguments(std::move(words));
  Reply reply = {entry_point->second(arguments), -1};
  for (size_t i = buffers.size(); i-- > 0;)
    if (buffers[i].overrun()) reply.overrun = static_cast<int64_t>(i);
  write(&reply, sizeof(reply));
  for (Buffer& buffer : buffers) write(buffer.data(), buffer.size());
  std::fflush(stdout);
}

}  // namespace

int main() {
  pybind11::module_ module;
  define_module(module);
  Request request;
  while (std::fread(&request, sizeof(request), 1, stdin) == 1) serve(module, request);
  return 0;
}
