"""Native kernels: compiling them on first use or ahead of time, and the emulator that runs CUDA kernels on a CPU."""
