"""Native CPU code for the decode linear, emitted as LLVM IR and compiled in memory when first used.

llvmlite was chosen by measurement (4096 x 4096, rank 16, one row): its code takes 5 us for the 1-bit adapter where numba
takes 24, torch float32 14, and no C compiler has to be present. The IR is written for 16 lanes and retargets as it is:
AVX-512, AVX2 and NEON differ in one lookup of 16 codes.
"""
