"""What the GPU kernels cost, from their machine code and their launches, without a GPU."""
