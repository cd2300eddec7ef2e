// Reading mapped memory whose file may be cut off or whose disk may fail, which the system tells by SIGBUS.
#pragma once

#include <cstdint>

namespace mlfr {

// Handles SIGBUS from now on: within copy_mapped() it makes that return false, elsewhere what handled it
// before does so still. Only the first call does anything.
void handle_bus_errors();

// memcpy; false where the memory could not be read.
bool copy_mapped(void* to, const void* from, uint64_t length);

}  // namespace mlfr
