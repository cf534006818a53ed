// See pybind11.h; there is nothing to convert.
#pragma once
