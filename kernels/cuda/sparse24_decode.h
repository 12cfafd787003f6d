// The packed weight of sparse24.cu (which includes this file at its end) as a dense matrix, for products of very many rows: from
// some hundred rows on, a GPU whose dense tensor instructions are faster than mma.sp wins by writing the weight out once.
#pragma once

namespace {

// One warp per unit of 32 outputs by 64 inputs. A lane (g, t) decodes quads t and t + 4 of both steps for rows g + 8 i; four lanes
// write the 16 inputs of a row that lie together. Each weight is code x scale in float32, rounded once, as the dense export has it.
template <class T>
__global__ void __launch_bounds__(256)
    decode_kernel(Shape shape, const uint8_t* packed, int scale_type, uint16_t* weight) {
    const size_t index = size_t(blockIdx.x) * 256 + threadIdx.x;
    if (index >= size_t(shape.units()) * shape.tiles() * LANES) return;
    const int lane = index % LANES, tile = index / LANES % shape.tiles(), unit = index / LANES / shape.tiles();
    const int g = lane / 4, t = lane % 4;
    const uint8_t* from = packed + (size_t(unit) * shape.tiles() + tile) * UNIT_BYTES;
    const uint4 codes = global_load<uint4>(from + lane * 16);
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        const int input = tile * UNIT_INPUTS + 32 * s;
        const uint2 scales = global_load<uint2>(
            packed + shape.scales_at() + (size_t(unit) * shape.groups() + input / shape.group) * SCALE_BYTES + g * 8);
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // quads 0 to 3, quads 4 to 7
            const uint2 meta = global_load<uint2>(from + CODE_BYTES + (g * 4 + 2 * s + half) * 8);
#pragma unroll
            for (int i = 0; i < 4; ++i) {  // row g + 8 i
                const uint32_t nibble = (i / 2 ? meta.y : meta.x) >> (16 * (i % 2) + 4 * t) & 0xF;
                const uint32_t word = words[i / 2 * 2 + s] >> (4 * (i % 2 + 2 * half));
                const float scale = scale_of(i / 2 ? scales.y : scales.x, i % 2, scale_type);
                const uint64_t first = Type<T>::round(float(int(word & 0xF) - 8) * scale);
                const uint64_t second = Type<T>::round(float(int(word >> 16 & 0xF) - 8) * scale);
                const uint64_t quad = first << (16 * (nibble & 3)) | second << (16 * (nibble >> 2));
                uint16_t* to = weight + size_t(unit * UNIT_ROWS + g + 8 * i) * shape.k + input + 16 * half + 4 * t;
                global_store<uint2>(to, uint2{uint32_t(quad), uint32_t(quad >> 32)});
            }
        }
    }
}

}  // namespace

// The packed weight as a dense matrix [n, k] of `type`.
extern "C" int sparse24_cuda_decode(const void* packed, int64_t n, int64_t k, int64_t group_size, int scale_type,
                                    int type, void* weight, void* stream) {
    const bool types = (type == BFLOAT16 || type == FLOAT16) && (scale_type == BFLOAT16 || scale_type == FLOAT16);
    if (!served(n, k, group_size) || !types) return 1;
    const Shape shape{int(n), int(k), int(group_size)};
    const auto kernel = type == BFLOAT16 ? decode_kernel<__nv_bfloat16> : decode_kernel<__half>;
    const int64_t threads = int64_t(shape.units()) * shape.tiles() * LANES;
    SPARSIFY_LAUNCH(kernel, dim3(ceil_div(threads, 256)), dim3(256), 0, stream, shape,
                    static_cast<const uint8_t*>(packed), scale_type, static_cast<uint16_t*>(weight));
    return cudaGetLastError() == cudaSuccess ? 0 : 2;
}
