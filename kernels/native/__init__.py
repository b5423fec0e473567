"""Native CPU code for the decode linear, emitted as LLVM IR and compiled in memory when first used.

llvmlite was chosen by measurement (docs/benchmarks-kernels.md): numba's loops and torch.compile do not turn a mask of
signs into one masked add, and a C extension would need a compiler at the user's. The IR is written for 16 lanes and
retargets as it is: AVX-512, AVX2 and NEON differ in one lookup of 16 codes.
"""
