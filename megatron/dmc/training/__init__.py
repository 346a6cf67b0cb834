"""Training on megatron-core: data, loop, metrics, pre-emption and the entry point. Import the modules themselves."""
