// As much of pybind11 as csrc/cpu/bindings.cpp uses, without Python: a module that remembers the
// native entry points and how to call each with the arguments of a request (../driver.cpp).
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "arm64 driver: %s\n", what);
  std::exit(2);
}

// What a launcher passes, with addresses of this process.
class Arguments {
 public:
  explicit Arguments(std::vector<uint64_t> words) : words_(std::move(words)) {}

  template <class T>
  T next() {
    return Reader<T>::read(*this);
  }

  void end() const {
    if (used_ != words_.size()) fail("too many arguments");
  }

 private:
  template <class T>
  struct Reader {
    static T read(Arguments& from) {
      if (from.used_ == from.words_.size()) fail("too few arguments");
      const uint64_t word = from.words_[from.used_++];
      if constexpr (std::is_floating_point_v<T>) {
        double value;
        std::memcpy(&value, &word, sizeof(value));
        return static_cast<T>(value);
      } else {
        return static_cast<T>(word);
      }
    }
  };

  template <class A, class B>
  struct Reader<std::pair<A, B>> {
    static std::pair<A, B> read(Arguments& from) {
      return std::pair<A, B>{from.next<A>(), from.next<B>()};
    }
  };

  std::vector<uint64_t> words_;
  size_t used_ = 0;
};

namespace pybind11 {

struct gil_scoped_release {
  gil_scoped_release() {}
  ~gil_scoped_release() {}
};

struct Attribute {
  template <class T>
  void operator=(const T&) {}
};

class module_ {
 public:
  std::map<std::string, std::function<int(Arguments&)>> entry_points;

  Attribute doc() { return {}; }
  Attribute attr(const char*) { return {}; }

  // An entry point takes numbers and gives a status.
  template <class... Parameters, class... Extra>
  void def(const char* name, int (*function)(Parameters...), const Extra&...) {
    entry_points[name] = [function](Arguments& arguments) {
      // Braces, unlike a call's parentheses, read them from left to right.
      std::tuple<Parameters...> values{arguments.next<Parameters>()...};
      arguments.end();
      return std::apply(function, values);
    };
  }

  // What tells about instruction sets and the like, and is not called from here.
  template <class Function, class... Extra>
  void def(const char*, const Function&, const Extra&...) {}
};

}  // namespace pybind11

#define PYBIND11_MODULE(name, module) void define_module(pybind11::module_& module)
