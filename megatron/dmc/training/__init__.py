"""Training on megatron-core: data, loop, metrics, preemption and the entry point. Import the modules themselves."""
