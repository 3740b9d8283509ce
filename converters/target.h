// Files of a given size: a type for every tensor, by what its errors cost.
#pragma once

#include <span>

#include "converters/convert.h"
#include "converters/quantize.h"
#include "converters/source.h"

namespace duet {

// True when options ask for a size.
bool has_target(const ConvertOptions& options);
std::string recipe_label(const ConvertOptions& options);  // for plans: the recipe, or "3.8 bits per weight asked for"
// Whether the size decides this job's type: not that of norms and routers, nor of what options name a type for.
std::vector<bool> free_types(const ConversionSource& source, const ConvertOptions& options);

// Gives every free tensor of the source the type with which the file costs least and is not larger than options
// ask for (knapsack.h), and says so in a notice per kind of tensor. A type costs the tensor's sensitivity times its
// relative_error(). sensitivity: per job, of any scale (calibrate/sensitivity.h measures it); empty: nothing is known
// of the model's inputs, kinds of tensors count as they do on average. Error(usage) when the smallest types are too large.
void choose_types(const ConvertOptions& options, std::span<const double> sensitivity, ConversionSource& source);

// Squared error that encoding leaves, in parts of the squares, both weighted by the job's importance: of rows
// spread over the tensor, 131072 weights of them.
double relative_error(const TensorJob& job, const Format& format, int n_threads);

}  // namespace duet
