// What a launch of each tile shape of sparse24.cu (which includes this file at its end) takes: `sparsify kernels inspect` reads it.
#pragma once

namespace {

struct Resources {
    int threads, shared[2];  // of a block; bytes of shared memory without and with groups of 32
};
#define SPARSIFY_RESOURCES(i, u, s, wr, wt, wk, st, ...) \
    {Config<u, s, wr, wt, wk, st>::THREADS,              \
     {shared_bytes<Config<u, s, wr, wt, wk, st>, false>(), shared_bytes<Config<u, s, wr, wt, wk, st>, true>()}},
constexpr Resources RESOURCES[] = {SPARSIFY_CONFIGS(SPARSIFY_RESOURCES)};

}  // namespace

extern "C" int sparse24_cuda_config_threads(int config) { return RESOURCES[config].threads; }
extern "C" int sparse24_cuda_config_shared_bytes(int config, int group32) { return RESOURCES[config].shared[group32]; }
