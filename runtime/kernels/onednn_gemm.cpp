#include "runtime/kernels/kernels.h"
