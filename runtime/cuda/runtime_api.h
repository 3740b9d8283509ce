// The few calls of the CUDA runtime that a device needs; implemented by it (runtime_api_cuda.cpp) and by the emulation
// (runtime_api_emulated.cpp). Texts of errors live until the next call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/cuda/operations.h"

namespace duet::gpu::api {

struct Event;

// Device `index` and what it is; null, or why it cannot be had: kNoDriver or kNoDevice itself where there is none at all.
const char* open(int index, DeviceInfo& info);
// What this thread calls next is meant for device `index`.
void use(int index);
uint64_t free_bytes();

void* allocate(size_t n_bytes);  // null: not enough
void release(void* p);
void* allocate_host(size_t n_bytes);
void release_host(void* p);

Stream* make_stream();
void drop_stream(Stream* stream);
Event* make_event();
void drop_event(Event* event);

void copy(void* dst, const void* src, size_t n_bytes, Stream* stream);
void record(Event* event, Stream* stream);
void wait(Stream* stream, Event* event);
void synchronize(Event* event);
void synchronize(Stream* stream);
// What has failed since the last time; null: nothing.
const char* take_error();

}  // namespace duet::gpu::api
