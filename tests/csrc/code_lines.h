// Where an address of code lies in the sources, as addr2line of the binutils tells.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <string>

namespace mlr1::emulator {

// " at FILE:LINE", and what was inlined in what; nothing where that is not known.
inline std::string line_of(const void* code) {
  Dl_info library{};
  if (dladdr(code, &library) == 0 || library.dli_fname == nullptr) {
    return "";
  }
  // A return address is that of the next instruction.
  const auto offset = reinterpret_cast<std::uintptr_t>(code) -
                      reinterpret_cast<std::uintptr_t>(library.dli_fbase) - 1;
  char command[4096];
  std::snprintf(command, sizeof(command), "addr2line -sie '%s' 0x%zx 2>/dev/null",
                library.dli_fname, static_cast<std::size_t>(offset));
  std::string story;
  if (FILE* const lines = popen(command, "r")) {
    char line[256];
    while (std::fgets(line, sizeof(line), lines) != nullptr) {
      std::string place(line);
      place = place.substr(0, place.find_first_of(" \n"));
      if (place.find('?') == std::string::npos) {
        story += (story.empty() ? " at " : " in ") + place;
      }
    }
    pclose(lines);
  }
  return story;
}

}  // namespace mlr1::emulator
