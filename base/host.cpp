#include "base/host.h"
