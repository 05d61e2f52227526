// Which instruction set runs: the best that the CPU has, or what QUIRE_ISA names.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace quire {
const Kernels& active_kernels();
std::vector<std::string> available_isas();      // best first
void select_isa(const std::string& name);       // throws std::invalid_argument with what is available
}
