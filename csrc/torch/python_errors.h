// Exceptions that become Python's ValueError and TypeError where an op refuses its arguments.
//
// torch calls an op within a function that pybind11 has bound, so pybind11 translates what is thrown:
// std::invalid_argument to ValueError, std::runtime_error to RuntimeError, and an exception derived
// from its builtin_exception to what set_error() sets. Exceptions are matched by the names of their
// types, which both libraries share. Where another library catches it, a TypeError is a
// std::runtime_error with the same message.
#pragma once

#include <stdexcept>

// Of the Python process, if there is one: weak, so that the library loads into a C++ program too.
extern "C" {
extern __attribute__((weak)) void* PyExc_TypeError;
__attribute__((weak)) void PyErr_SetString(void* exception, const char* message);
}

namespace pybind11 {

// As pybind11 declares it (pybind11/detail/exception_translation.h), whose headers need Python's.
class __attribute__((visibility("default"))) builtin_exception : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  virtual void set_error() const = 0;
};

}  // namespace pybind11

namespace sink_attention::binding {

using ValueError = std::invalid_argument;

class __attribute__((visibility("default"))) TypeError : public pybind11::builtin_exception {
 public:
  using builtin_exception::builtin_exception;
  void set_error() const override {
    if (PyErr_SetString != nullptr) PyErr_SetString(PyExc_TypeError, what());
  }
};

}  // namespace sink_attention::binding
