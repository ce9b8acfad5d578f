// SPDX-License-Identifier: MIT
// What the host needs to launch a kernel.
#pragma once

namespace dmfast {

const char* cuda_error_text(int error);

}  // namespace dmfast
