// Error messages: op, argument, got, want. Torch turns the exception into a RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace qlora_ext {

// Ints as a Python list, for messages: [64, 128].
template <class Ints>
std::string list_string(const Ints& ints) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < ints.size(); ++i) text << (i ? ", " : "") << ints[i];
  text << ']';
  return text.str();
}

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace qlora_ext

// A macro, so that the message's parts are evaluated only if the check fails. At M = 1 the host's
// time matters.
#define QLORA_CHECK(condition, op, ...)   \
  do {                                    \
    if (!(condition)) [[unlikely]]        \
      ::qlora_ext::fail(op, __VA_ARGS__); \
  } while (0)
