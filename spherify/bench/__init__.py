"""What a model costs on this machine: interleaved timings and peak memory of its plain, converted and folded forms."""
